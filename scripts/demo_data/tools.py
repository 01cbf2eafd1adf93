"""Tool use: function schemas, requests that need them, the hermes calls and what is said about the results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from .lists import items, lines, lists
from .patterns import expand
from .phrases import phrases

# Kinds whose value may be any name, so that the model learns to copy rather than to remember.
_NAMES = {"city", "person", "song", "topic", "product", "country", "room", "food", "note", "phrase"}
_PHRASES = {"note", "phrase", "topic"}
_TYPES = {"int": "integer", "number": "number"}


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
    if kind == "int":
        return rng.randint(1, 99) if rng.random() < 0.7 else rng.randint(100, 9999)
    if kind == "number":
        return rng.randint(1, 99) + rng.choice((0.5, 0.25, 0.1, 0.75))
    if kind == "code":
        return "".join(rng.choice("ABCDEFGHKLMNPRSTUVWXYZ") for _ in range(2)) + str(rng.randint(10, 99999))
    if kind == "clock":
        return f"{rng.randint(0, 23):02d}:{rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02d}"
    if kind == "path":
        folder, ending = rng.choice(("", "data/", "src/", "docs/")), rng.choice(("txt", "py", "md", "json"))
        return f"{folder}{new_name(rng).lower()}.{ending}"
    if kind == "expression":
        return f"{rng.randint(1, 999)} {rng.choice('+-*/')} {rng.randint(1, 999)}"
    if kind == "done":
        return rng.choice(("ok", "done", "success"))
    if kind == "name":
        return new_name(rng)
    if kind == "word":
        return new_name(rng).lower()
    if kind in _PHRASES and rng.random() < 0.3:
        gap, words = (
            (" ", phrases("en", "strange words")) if language == "en" else ("", lists("unknown.txt")["zh character"])
        )
        return gap.join(rng.choice(words) for _ in range(rng.randint(2, 5)))
    if kind in _NAMES and language == "zh" and rng.random() < 0.3:
        return "".join(rng.choice(lists("unknown.txt")["zh character"]) for _ in range(rng.randint(2, 4)))
    if kind in _NAMES and rng.random() < (0.5 if language == "en" else 0.15):
        name = new_name(rng)
        return f"{name} {new_name(rng)}" if rng.random() < 0.15 else name
    values = lists("values.txt")
    return rng.choice(values.get(f"{language} {kind}") or values[f"en {kind}"])


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


def made_up_family(rng: Random, language: str = "en", test: bool = False) -> Family:
    """A function named after a verb and a noun, such as ``close_ticket``, with a parameter to copy."""
    words = lists("values.txt")
    verb, noun = rng.choice(words["new"]).split()
    while not test and f"{verb} {noun}" in words["new"]:
        verb, noun = rng.choice(words["verb"]), rng.choice(words["noun"])
    kind, names = rng.choice(
        (("int", "id number"), ("name", "name title"), ("word", "key label"), ("code", "code reference"))
    )
    parameter = Parameter((*names.split(), f"{noun}_{names.split()[0]}"), kind, f"The {names.split()[0]} of the {noun}")
    do = f"{verb} the {noun} {{0}}"
    asks: tuple[str, ...] = (
        do,
        f"{verb} {noun} {{0}}",
        f"please {verb} {noun} {{0}}",
        f"can you {do}",
        f"i want to {do}",
    )
    if not test:
        asks += (f"{do} [now|for me|please|, thanks]", f"the {noun} {{0}} [must|should] be handled: {verb} it")
    chinese = dict(pair.split("=") for name in ("zh verb", "zh noun") for pair in words[name])
    act, thing = chinese[verb], chinese[noun]
    zh = (
        f"{act}{thing}{{0}}",
        f"[请|帮我|我要|]{act}{thing}{{0}}",
        f"把{thing}{{0}}{act}",
        f"{thing}{{0}}，{act}[一下|]",
    )
    return Family(
        (f"{verb}_{noun}",),
        (f"{verb.capitalize()} a {noun}", f"{verb.capitalize()} the {noun} by {names.split()[0]}"),
        (parameter,),
        asks,
        zh,
        asks,
        zh,
        (("status", "done"),),
        f"The request to {verb} the {noun} {{0}} is done.",
        f"{act}{thing}{{0}}的请求已完成。",
    )


def invented_family(rng: Random) -> Family:
    """A function whose name and parameters mean nothing, asked for by name: all of the call has to be copied."""
    name = new_name(rng).lower()
    name += rng.choice(("", "_" + new_name(rng).lower(), "_" + rng.choice(lists("values.txt")["noun"])))
    parameters = []
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        label = new_name(rng).lower()
        if rng.random() < 0.5:
            label = rng.choice(lists("values.txt")["noun"]) + rng.choice(("", "_id", "_name", "_" + label))
        if all(label not in parameter.names for parameter in parameters):
            kind = rng.choice(("int", "name", "word", "number", "code", "city", "phrase"))
            parameters.append(Parameter((label,), kind, f"The {label}"))
    said = ", ".join(f"{parameter.names[0]} {{{i}}}" for i, parameter in enumerate(parameters))
    joined = " and ".join(f"{parameter.names[0]} {{{i}}}" for i, parameter in enumerate(parameters))
    equal = ", ".join(f"{parameter.names[0]}={{{i}}}" for i, parameter in enumerate(parameters))
    en = (
        f"[call|use|run|invoke|execute] {name} with [{joined}|{equal}|{said}]",
        f"[i need|please|now] {name}: [{said}|{equal}]",
        f"{name}, {joined}",
    )
    zh = (f"[调用|使用|执行] {name}，[{said}|{equal}]", f"用 {name}，{equal}", f"{name}：{said}")
    done = f"{name} is done."
    return Family(
        (name,), (f"Do {name}", "A function"), tuple(parameters), en, zh, en, zh, (("status", "done"),), done, done
    )


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


def draw_case(rng: Random, language: str, test: str = "") -> ToolCase:
    """A random request with one to three tools.

    ``test`` selects what training never sees: "phrases" for requests in other words, "functions" for unknown functions.
    """
    way = rng.random()
    if test == "functions" or (not test and way < 0.3):
        family = made_up_family(rng, language, test == "functions")
    elif not test and way < 0.5:
        family = invented_family(rng)
    else:
        family = rng.choice([family for family in families() if family.test_en or not test])
    asks = (family.test_en, family.test_zh) if test == "phrases" else (family.en, family.zh)
    return make_case(family, rng.choice(asks[language == "zh"]), language, rng)


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
