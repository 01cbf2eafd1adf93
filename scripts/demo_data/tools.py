"""Tool use: function schemas, requests that need them, the hermes calls and what is said about the results."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from random import Random
from typing import Any

from .families import Family, families
from .made_up import invented_family, made_up_family
from .patterns import expand
from .phrases import phrases
from .values import OPEN, draw_value

_TYPES = {"int": "integer", "number": "number"}


def schema(family: Family, rng: Random) -> tuple[dict[str, Any], list[str]]:
    """A function schema of ``family`` with names drawn, and the names of its parameters in the family's order."""
    names: list[str] = []
    properties: dict[str, Any] = {}
    for parameter in family.parameters:
        name = rng.choice(parameter.names)
        names.append(name)
        properties[name] = {"type": _TYPES.get(parameter.kind, "string")}
        if rng.random() < 0.5:
            properties[name]["description"] = parameter.description
    function: dict[str, Any] = {"name": rng.choice(family.names)}
    if rng.random() < 0.85:
        function["description"] = rng.choice(family.descriptions)
    function["parameters"] = {"type": "object", "properties": properties}
    if rng.random() < 0.8:
        function["parameters"]["required"] = list(names)
    return {"type": "function", "function": function}, names


@dataclass(frozen=True)
class ToolCase:
    """A request with tools: the tools offered, the call that is right, and what follows it."""

    tools: list[dict[str, Any]]
    request: str
    name: str
    arguments: dict[str, Any]
    result: dict[str, Any]
    said: str
    language: str


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """The hermes form of a call."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


# How often words are put before a request, after it, and beside one of its values.
BEFORE, AFTER, BESIDE = 0.3, 0.3, 0.18


def surround(ask: str, family: Family, language: str, rng: Random) -> str:
    """``ask`` with words that say nothing: before it, after it, next to a value.

    What a value is must follow from the words that name it and not from where the request begins or ends. Where a value
    could hold any word itself, only words with a mark stand next to it.
    """
    gap = " " if language == "en" else ""
    if rng.random() < BESIDE:
        ask = _beside(ask, family, language, rng)
    first, last = re.match(r"\{(\d)\}", ask), re.search(r"\{(\d)\}$", ask)
    if rng.random() < AFTER:
        marked = last is not None and family.parameters[int(last[1])].kind in OPEN
        words = rng.choice([words for words in phrases(language, "request after") if not marked or words[0] in ",，"])
        ask += words if words[0] in ",，" else gap + words
    if rng.random() < BEFORE:
        marked = first is not None and family.parameters[int(first[1])].kind in OPEN
        words = rng.choice(
            [words for words in phrases(language, "request before") if not marked or words[-1] in ",:，："]
        )
        if not marked and rng.random() < 0.15:  # any word at all
            words = gap.join(rng.choice(phrases(language, "strange words")) for _ in range(rng.randint(1, 3)))
        ask = words + gap + ask
    return ask


def _beside(ask: str, family: Family, language: str, rng: Random) -> str:
    """``ask`` with a word before or after one of its values, where that value stays recognisable."""
    gap = " " if language == "en" else ""
    found = []
    for match in re.finditer(r"\{(\d)\}", ask):
        kind = family.parameters[int(match[1])].kind
        left, right = ask[: match.start()][-1:], ask[match.end() :][:1]
        free = left in ("", " ") and right in ("", " ") if gap else not {left, right} & set('“”《》`"=+/')
        if free and kind not in OPEN | {"expression", "command"}:
            found.append((match, kind))
    if not found:
        return ask
    match, kind = rng.choice(found)
    words = phrases(language, "request beside") + (phrases("en", "strange words") if gap else ())
    # a number is followed by what it counts
    if kind in ("int", "number") or rng.random() < 0.4:
        word = rng.choice(words + phrases(language, "request ahead"))
        return ask[: match.start()] + word + gap + ask[match.start() :]
    word = rng.choice(words)
    return ask[: match.end()] + gap + word + ask[match.end() :]


def draw_case(rng: Random, language: str, test: str = "") -> ToolCase:
    """A random request with one to three tools.

    ``test`` selects what training never sees: "phrases" for requests in other words, "functions" for unknown functions.
    """
    way = rng.random()
    if test == "functions" or (not test and way < 0.27):
        family = made_up_family(rng, test == "functions")
    elif not test and way < 0.42:
        family = invented_family(rng)
    else:
        family = rng.choice([family for family in families() if family.test_en or not test])
    asks = (family.test_en, family.test_zh) if test == "phrases" else (family.en, family.zh)
    ask = rng.choice(asks[language == "zh"])
    return make_case(family, ask if test else surround(expand(ask, rng), family, language, rng), language, rng)


def make_case(family: Family, ask: str, language: str, rng: Random) -> ToolCase:
    """The request ``ask`` for ``family``, with random values and other tools beside it."""
    tool, names = schema(family, rng)
    tools = [tool]
    taken = {tool["function"]["name"], family.names[0]}
    for _ in range(rng.choice((0, 0, 0, 0, 1, 1, 2))):
        way = rng.random()
        other = made_up_family(rng) if way < 0.3 else invented_family(rng) if way < 0.4 else rng.choice(families())
        if other.names[0] not in taken:
            taken.add(other.names[0])
            tools.append(schema(other, rng)[0])
    rng.shuffle(tools)
    values = [draw_value(parameter.kind, language, rng) for parameter in family.parameters]
    request = expand(ask, rng).format(*values)
    result = {name: draw_value(kind, language, rng) for name, kind in family.results}
    said = (family.said_zh if language == "zh" else family.said_en).format(*values, **result)
    arguments = dict(zip(names, values, strict=True))
    return ToolCase(tools, request, tool["function"]["name"], arguments, result, said, language)
