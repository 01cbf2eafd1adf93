"""Functions for tool use with the requests that need them. See ``tools.txt``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .lists import items, lines


@dataclass(frozen=True)
class Parameter:
    """One parameter of a function: names it may have, its kind of value and its description."""

    names: tuple[str, ...]
    kind: str
    description: str


@dataclass(frozen=True)
class Family:
    """A function in its variants, with patterns of requests. ``{0}`` is the value of the first parameter."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    en: tuple[str, ...]
    zh: tuple[str, ...]
    test_en: tuple[str, ...]
    test_zh: tuple[str, ...]
    results: tuple[tuple[str, str], ...]  # name and kind of each value of the result
    said_en: str
    said_zh: str


@cache
def families() -> tuple[Family, ...]:
    """The functions that training knows."""
    return load_families("tools.txt")


def load_families(name: str) -> tuple[Family, ...]:
    """The functions of the file ``name``; without requests for the evaluation it has none."""
    found = []
    for block in ("\n" + "\n".join(lines(name))).split("\n= ")[1:]:
        names, *rest = block.split("\n")
        fields: dict[str, list[str]] = {}
        for line in rest:
            field, _, value = line.partition(":")
            fields.setdefault(field, []).append(value.strip())
        parameters = []
        for parameter in fields["param"]:
            variants, kind, description = (part.strip() for part in parameter.split(" | "))
            parameters.append(Parameter(items(variants), kind, description))
        results = [tuple(part.strip() for part in result.split(" | ")) for result in items(fields["result"][0])]
        found.append(
            Family(
                names=items(names),
                descriptions=items(fields["description"][0]),
                parameters=tuple(parameters),
                en=items(";".join(fields["en"])),
                zh=items(";".join(fields["zh"])),
                test_en=items(fields.get("test", [""])[0]),
                test_zh=items(fields.get("ztest", [""])[0]),
                results=tuple((name, kind) for name, kind in results),
                said_en=fields["said"][0],
                said_zh=fields["zsaid"][0],
            )
        )
    return tuple(found)
