"""Reads lists of phrases: lines ``name: item; item; item`` in a text file beside this one."""

from __future__ import annotations

from functools import cache
from pathlib import Path

DATA = Path(__file__).parent


def items(value: str) -> tuple[str, ...]:
    """The items of a list separated by semicolons."""
    return tuple(item.strip() for item in value.split(";") if item.strip())


def lines(name: str) -> list[str]:
    """The lines of a data file without comments and empty ones."""
    text = (DATA / name).read_text(encoding="utf-8")
    return [line for line in text.split("\n") if line.strip() and not line.startswith("#")]


@cache
def lists(name: str) -> dict[str, tuple[str, ...]]:
    """All lists of the file ``name``.

    Raises:
        ValueError: a list is given twice.
    """
    found: dict[str, tuple[str, ...]] = {}
    for line in lines(name):
        key, _, value = line.partition(":")
        if key in found:
            raise ValueError(f"{name}: the list {key!r} is given twice")
        found[key] = items(value)
    return found
