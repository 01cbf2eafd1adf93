"""The file of ``--config``: options of a command, as YAML.

model: Qwen/Qwen3-0.6B
max-model-len: 4k            # as on the command line
enforce-eager: true          # a switch; false is --no-enforce-eager
served-model-name: [small, qwen]
override-generation-config:
  temperature: 0.5
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nanovllm.entrypoints.cli.parser import UsageError, suggestion


def read_config_file(file: str, options: Mapping[str, argparse.Action], taken: Collection[str]) -> list[str]:
    """What a command line with the same options would hold.

    Args:
        options: option -> its action, of the command's parser.
        taken: destinations that the command line sets itself; the file's value is checked and left out.

    Raises:
        UsageError: the file cannot be read, is not a YAML mapping, names an option there is none of, or has a value of
            the wrong kind.
    """
    arguments: list[str] = []
    for key, value in _read(file).items():
        name = "--" + str(key).replace("_", "-")
        action = options.get(name)
        if action is None or name in ("--help", "--config"):
            known = [option[2:] for option in options if option.startswith("--")]
            raise UsageError(f"{file}: there is no option {key!r}{suggestion(str(key).replace('_', '-'), known)}")
        try:
            words = _words(name, action, value)
        except ValueError as error:
            raise UsageError(f"{file}: {key}: {error}") from None
        if action.dest not in taken:
            arguments += words
    return arguments


def _read(file: str) -> dict[Any, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"--config {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {file}: not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"--config {file}: must hold options, one per line, such as 'max-model-len: 4k'")
    return content


def _words(name: str, action: argparse.Action, value: Any) -> list[str]:
    """An option and its value as words of a command line.

    Raises:
        ValueError: a value of the wrong kind.
    """
    if value is None:
        raise ValueError("its value is missing")
    if isinstance(value, bool):
        if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
            opposite = name.replace("--no-", "--", 1) if name.startswith("--no-") else name.replace("--", "--no-", 1)
            return [name] if value else [opposite] if opposite in action.option_strings else []
        if action.nargs == "?":  # a value, or nothing
            return [name] if value else []
        raise ValueError(f"needs a value, not {str(value).lower()}; put a word in quotation marks")
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        raise ValueError(f"is a switch, true or false, not {value!r}")
    if isinstance(value, list):
        if action.nargs in ("*", "+"):
            return [name, *map(_word, value)]
        if isinstance(action, argparse._AppendAction):
            return [f"{name}={_word(item)}" for item in value]
        raise ValueError("takes one value, not a list")
    return [f"{name}={_word(value)}"]


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list, bool)) else str(value)
