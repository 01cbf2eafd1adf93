"""Draws arguments of calls: most can only be copied, since they are too many to learn. See ``values.txt``."""

from __future__ import annotations

import re
from random import Random
from string import ascii_uppercase
from typing import Any

from .lists import lists
from .patterns import expand
from .phrases import phrases

# Kinds whose value may end with any word: nothing tells it from words that follow.
OPEN = {"note", "phrase", "topic", "song"}


def new_name(rng: Random) -> str:
    """A name that means nothing: it can only be copied."""
    if rng.random() < 0.3:
        return "".join(
            rng.choice(("bcdfghjklmnpqrstvwxz", "aeiouy")[i % 2]) for i in range(rng.randint(3, 8))
        ).capitalize()
    syllables = lists("values.txt")["syllable"]
    return "".join(rng.choice(syllables) for _ in range(rng.randint(2, 3))).capitalize()


def draw_value(kind: str, language: str, rng: Random) -> Any:
    """A random argument: an int for "int", otherwise text in ``language`` where the kind has one."""
    values = lists("values.txt")
    if kind == "int":
        return rng.choices((rng.randint(1, 99), rng.randint(100, 9999), rng.randint(10000, 99999)), (60, 32, 8))[0]
    if kind == "number":
        return rng.randint(1, 99) + rng.choice((0.5, 0.25, 0.1, 0.75))
    if kind == "code":
        letters = "".join(rng.choice("ABCDEFGHKLMNPRSTUVWXYZ") for _ in range(rng.choice((1, 2, 2, 3))))
        return letters + rng.choice(("", "", "", "-")) + str(rng.randint(10, 99999))
    if kind == "symbol" and rng.random() < 0.4:
        return "".join(rng.choice(ascii_uppercase) for _ in range(rng.randint(2, 5)))
    if kind == "clock":
        return f"{rng.randint(0, 23):02d}:{rng.choice((rng.randrange(60), rng.randrange(0, 60, 5))):02d}"
    if kind == "path":
        folder, ending = rng.choice(("", "data/", "src/", "docs/", "/tmp/", "a/b/")), rng.choice(_ENDINGS)
        name = rng.choice(values["en thing"]) if rng.random() < 0.4 else new_name(rng).lower()
        return f"{folder}{name}{rng.choice(('', '', f'_{rng.randint(1, 99)}', '-old'))}.{ending}"
    if kind == "expression":
        return draw_expression(rng)
    if kind == "done":
        return rng.choice(("ok", "done", "success"))
    if kind == "name":
        return new_name(rng)
    if kind == "word":
        return rng.choice(values["en thing"]) if rng.random() < 0.35 else new_name(rng).lower()
    made = values.get(f"{language} made {kind}")
    way = rng.random()
    if made and way < 0.08:
        words = phrases("en", "strange words") if language == "en" else lists("unknown.txt")["zh character"]
        if language == "zh" or kind in OPEN:
            return (" " if language == "en" else "").join(rng.choice(words) for _ in range(rng.randint(2, 5)))
        return new_name(rng)
    if made and way < 0.5:
        return compose(rng.choice(made), language, rng)
    return rng.choice(values.get(f"{language} {kind}") or values[f"en {kind}"])


_ENDINGS = ("txt", "py", "md", "json", "csv", "log", "pdf", "yaml")


def draw_expression(rng: Random) -> str:
    """A formula of two or three numbers."""
    numbers = [rng.randint(1, 10 ** rng.choice((2, 3, 3, 4))) for _ in range(3)]
    first, second = rng.choice("+-*/"), rng.choice("+-*/")
    form = rng.choice(("{} {} {}",) * 5 + ("{}{}{}", "{} {} {} {} {}", "({} {} {}) {} {}"))
    return form.format(numbers[0], first, numbers[1], second, numbers[2])


def compose(pattern: str, language: str, rng: Random) -> str:
    """A value composed of words: ``{thing}`` is one of the list of things, ``{thing2}`` and ``{Thing}`` are others."""
    values = lists("values.txt")

    def word(match: re.Match[str]) -> str:
        kind = match[1].lower()
        if kind == "number":
            return str(rng.randint(2, 999))
        drawn = new_name(rng) if kind == "name" else rng.choice(values[f"{language} {kind}"])
        return drawn.capitalize() if match[1] != kind else drawn

    return re.sub(r"\{([A-Za-z]+)\d?\}", word, expand(pattern, rng))
