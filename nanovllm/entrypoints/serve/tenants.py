"""The file of ``--tenants``: who may call, how much, and before whom.

search:                            # the tenant's name, a label in /metrics
  api_keys: [sk-one, sk-two]       # what its clients send; at least one
  requests_per_minute: 600         # no limit if it is left out, as with the next two
  tokens_per_minute: 200000        # of prompts and outputs together
  max_concurrent_requests: 8
  priority: 0                      # smaller goes first; others than 0 need --scheduling-policy priority
  weight: 2                        # share under overload, relative to the other tenants of its priority
default:                           # those who bring a key of --api-key; it has no api_keys of its own
  weight: 1
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.errors import ParameterError

if TYPE_CHECKING:
    from yaml.nodes import MappingNode, Node

DEFAULT = "default"  # whoever brings a key of --api-key
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MOST = 2**53  # what a number may be: beyond it, counting by ones has no effect


@dataclass(frozen=True)
class Tenant:
    """What the file says of one tenant; None is no limit."""

    name: str
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_concurrent_requests: int | None = None
    priority: int = 0
    weight: float = 1.0


def read_tenants(file: str, other_keys: tuple[str, ...] = ()) -> dict[str, Tenant]:
    """The tenants of a file by name; `DEFAULT` is always among them.

    Args:
        other_keys: those of ``--api-key``, which no tenant may have.

    Raises:
        ParameterError: the file cannot be read, or something in it cannot be honoured; it names line, field, value and
            remedy, and no key.
    """
    tenants: dict[str, Tenant] = {}
    owners = dict.fromkeys(other_keys, "--api-key")
    for name, (node, settings) in _Reader(file).tenants().items():
        tenant = Tenant(name=name, **settings)
        for key in tenant.api_keys:
            if key in owners:
                raise _error(file, node, f"{name}.api_keys", "...",
                             f"one of the keys is also that of {owners[key]}: give each a key of its own")  # fmt: skip
            owners[key] = name
        tenants[name] = tenant
    return {DEFAULT: Tenant(DEFAULT), **tenants}


class _Reader:
    """A file, taken apart with the lines its parts are in."""

    def __init__(self, file: str) -> None:
        import yaml

        self._file = file
        try:
            text = Path(file).read_text(encoding="utf-8-sig")
            self._loader = yaml.SafeLoader(text)
            self._root = self._loader.get_single_node()
        except OSError as error:
            raise ParameterError(f"cannot be read: {error.strerror}", "tenants", file) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ParameterError(f"is not YAML: {' '.join(str(error).split())}", "tenants", file) from error

    def tenants(self) -> dict[str, tuple[Node, dict[str, Any]]]:
        """Name -> (where it is, checked settings)."""
        found = {name: (node, self._settings(name, node)) for name, node in self._pairs(self._root, "").items()}
        if not found:
            raise ParameterError("names no tenant: write 'NAME:' and under it 'api_keys: [KEY]'", "tenants", self._file)
        return found

    def _settings(self, name: str, node: Node) -> dict[str, Any]:
        if not NAME.fullmatch(name):
            raise _error(
                self._file, node, "name", name, "use up to 64 letters, digits and . _ -, a letter or digit first"
            )
        settings: dict[str, Any] = {}
        for key, value_node in self._pairs(node, name).items():
            setting = key.replace("-", "_")
            check = _CHECKS.get(setting)
            if check is None or setting in settings:
                remedy = "it is there twice" if check else f"there is no such setting; there are {', '.join(_CHECKS)}"
                raise _error(self._file, value_node, f"{name}.{key}", "...", remedy)
            value = self._loader.construct_object(value_node, deep=True)
            remedy = check(value)
            if remedy:
                shown = "..." if setting == "api_keys" else value
                raise _error(self._file, value_node, f"{name}.{setting}", shown, remedy)
            settings[setting] = _as_keys(value) if setting == "api_keys" else value
        if (name == DEFAULT) == bool(settings.get("api_keys")):
            if name == DEFAULT:
                raise _error(
                    self._file, node, f"{name}.api_keys", "...", "its keys are those of --api-key: leave this out"
                )
            raise _error(self._file, node, f"{name}.api_keys", "nothing", "give it at least one key: api_keys: [KEY]")
        return settings

    def _pairs(self, node: Node | None, place: str) -> dict[str, Node]:
        """Keys and values of a mapping; an empty node is an empty one."""
        if node is None or (node.tag == "tag:yaml.org,2002:null" and place):
            return {}
        if node.id != "mapping":
            shown = self._loader.construct_object(node, deep=True)
            remedy = "write settings under it, such as 'weight: 2'" if place else "write 'NAME:' and settings under it"
            raise _error(self._file, node, place or "the file", shown, remedy)
        mapping: MappingNode = node  # type: ignore[assignment]
        pairs: dict[str, Node] = {}
        for key_node, value_node in mapping.value:
            key = str(key_node.value)
            if key in pairs:
                raise _error(self._file, key_node, f"{place}.{key}".lstrip("."), "...", "it is there twice: remove one")
            pairs[key] = value_node
        return pairs


def _error(file: str, node: Node, place: str, value: Any, remedy: str) -> ParameterError:
    return ParameterError(f"{file}, line {node.start_mark.line + 1}: {place} is {value!r}: {remedy}", "tenants", file)


# -- what a setting may be; the remedy if it is not ------------------------------------------------------------------


def _limit(value: Any) -> str:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value <= MOST
    return "" if fits else "use a number of at least 1, or leave it out for no limit"


def _count(value: Any) -> str:
    return "" if _whole(value) and 0 < value <= MOST else "use a whole number above 0, or leave it out for no limit"


def _level(value: Any) -> str:
    return "" if _whole(value) and abs(value) <= MOST else "use a whole number; smaller goes first, 0 is usual"


def _share(value: Any) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return "" if number and 1e-3 <= value <= 1e6 else "use a number from 0.001 to 1000000; 1 is usual"


def _keys(value: Any) -> str:
    keys = _as_keys(value)
    if not keys or not all(isinstance(key, str) and key.strip() for key in keys):
        return "use a list of keys, in quotation marks if they are numbers"
    if not all(key.isascii() and key.isprintable() and key == key.strip() for key in keys):
        return "a key is sent in a header: use letters, digits and signs without spaces around them"
    return "" if len(set(keys)) == len(keys) else "a key is there twice: remove one"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_keys(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list) else (value,)


_CHECKS: Mapping[str, Any] = {
    "api_keys": _keys,
    "requests_per_minute": _limit,
    "tokens_per_minute": _limit,
    "max_concurrent_requests": _count,
    "priority": _level,
    "weight": _share,
}
assert set(_CHECKS) == {each.name for each in fields(Tenant)} - {"name"}
