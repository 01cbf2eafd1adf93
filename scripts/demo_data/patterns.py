"""Patterns: phrases with alternatives, from which thousands of questions are drawn.

``[a|b]`` is one of its alternatives, each as likely as the others, ``[a|]`` may be left out, and ``<name>`` is one of
a class of phrases. Alternatives may hold further brackets. ``patterns_*.txt`` hold classes and patterns of every topic,
``situations_*.txt`` more of both, one pattern a line.
"""

from __future__ import annotations

import re
from functools import cache
from random import Random

from .lists import items, lines

# A choice is a list of sequences, a sequence a list of texts and choices.
Sequence = list["str | Choice"]
Choice = list[Sequence]


@cache
def patterns(language: str) -> dict[str, tuple[str, ...]]:
    """The patterns of every topic in ``language``, classes filled in.

    Raises:
        ValueError: a name is given twice, a class is unknown, or the brackets of a pattern do not match.
    """
    classes: dict[str, str] = {}
    found: dict[str, tuple[str, ...]] = {}
    for file in ("patterns", "situations"):
        here: dict[str, list[str]] = {}
        name = ""
        for line in lines(f"{file}_{language}.txt"):
            if line.startswith(" "):
                here[name].append(line.strip())
                continue
            name, _, value = line.partition(":")
            if name in here or name.strip("<>") in classes:
                raise ValueError(f"patterns of {name!r} are given twice")
            if name.startswith("<"):
                classes[name.strip("<>")] = f"[{value.strip()}]"
            else:
                here[name] = list(items(value))
        for name, given in here.items():
            found[name] = found.get(name, ()) + tuple(_filled(pattern, classes) for pattern in given)
    return found


def _filled(pattern: str, classes: dict[str, str]) -> str:
    """``pattern`` with the alternatives of its classes; checked."""
    for key, alternatives in classes.items():
        pattern = pattern.replace(f"<{key}>", alternatives)
    if "<" in pattern:
        raise ValueError(f"a pattern uses an unknown class: {pattern}")
    _parse(pattern)
    return pattern


def expand(pattern: str, rng: Random) -> str:
    """A text that ``pattern`` stands for."""
    return re.sub(" +", " ", _draw(_parse(pattern), rng)).strip()


@cache
def _parse(pattern: str) -> Sequence:
    sequence, at = _sequence(pattern, 0, inside=False)
    if at != len(pattern):
        raise ValueError(f"a bracket is closed that was not opened: {pattern}")
    return sequence


def _sequence(text: str, at: int, inside: bool) -> tuple[Sequence, int]:
    sequence: Sequence = []
    plain = ""
    while at < len(text) and not (text[at] == "]" or (inside and text[at] == "|")):
        if text[at] == "[":
            choice: Choice = []
            while at < len(text) and text[at] != "]":
                member, at = _sequence(text, at + 1, inside=True)
                choice.append(member)
            if at == len(text):
                raise ValueError(f"a bracket is not closed: {text}")
            sequence += [plain, choice]
            plain = ""
        else:
            plain += text[at]
        at += 1
    return [*sequence, plain], at


def _draw(sequence: Sequence, rng: Random) -> str:
    return "".join(part if isinstance(part, str) else _draw(rng.choice(part), rng) for part in sequence)
