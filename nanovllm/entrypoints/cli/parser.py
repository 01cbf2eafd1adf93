"""argparse with vLLM's conventions.

``_`` and ``-`` are the same in the name of an option, switches come as ``--x`` and ``--no-x``, and whole numbers may be
written for people: ``1k`` is 1,000, ``1K`` is 1,024.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

_SUFFIXES = {
    letter: base**power
    for power, letters in enumerate(("kK", "mM", "gG", "tT"), start=1)
    for letter, base in zip(letters, (1000, 1024), strict=True)
}


class UsageError(ValueError):
    """The command line is not understood."""


class CommandParser(argparse.ArgumentParser):
    """A parser that raises `UsageError` instead of ending the process, and suggests what may have been meant."""

    def __init__(self, **settings: Any) -> None:
        # An abbreviation would change its meaning with the next option that begins like it.
        super().__init__(**{"allow_abbrev": False, **settings})

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        return super().parse_args(_dashes(args), namespace)

    def parse_known_args(self, args: Any = None, namespace: Any = None, **more: Any) -> Any:
        # Checked here, where the options of the subcommand are known, rather than after all parsers have run.
        namespace, unknown = super().parse_known_args(args, namespace, **more)
        if unknown:
            first = unknown[0]
            if first.startswith("-"):
                hint = suggestion(first.split("=")[0], self._option_string_actions)
                self.error(f"there is no option {first}{hint}")
            self.error(f"{first!r} is one argument too many; quote an argument that contains spaces")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def suggestion(word: str, known: Iterable[str]) -> str:
    """``"; did you mean ...?"`` for a word close to a known one, else nothing."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def human_int(text: str) -> int:
    """A whole number: ``4096``, ``1k`` = 1000, ``1K`` = 1024, ``25.6k`` = 25600; so too m/M, g/G, t/T.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    match = re.fullmatch(r"([+-]?\d+)|([+-]?\d+(?:\.\d+)?)([kKmMgGtT])", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number such as 4096, 4k (4000) or 4K (4096)")
    plain, number, suffix = match.groups()
    return int(plain) if plain else round(float(number) * _SUFFIXES[suffix])


def json_object(text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        argparse.ArgumentTypeError: not JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object such as {{"key": 1}}')
    return value


def _dashes(arguments: Sequence[str]) -> list[str]:
    """``--max_tokens=8`` as ``--max-tokens=8``, up to a bare ``--``."""
    result = list(arguments)
    for index, argument in enumerate(result):
        if argument == "--":
            break
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            result[index] = name.replace("_", "-") + equals + value
    return result
