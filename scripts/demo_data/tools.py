"""Tool use: function schemas, requests that need them, the hermes calls and what is said about the results."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from random import Random
from string import ascii_uppercase
from typing import Any

from .lists import items, lines, lists
from .patterns import expand
from .phrases import phrases

# Kinds whose value may end with any word: nothing tells it from words that follow.
_OPEN = {"note", "phrase", "topic", "song"}
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
        if language == "zh" or kind in _OPEN:
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


# What a made-up function may want besides: kind, names, and how requests in English and Chinese tell it.
_SECOND = (
    ("person", "user person owner assignee", "for {1}", "给{1}"),
    ("person", "sender author", "from {1}", "来自{1}"),
    ("city", "city place location site", "in {1}", "在{1}"),
    ("room", "room area", "in the {1}", "在{1}"),
    ("clock", "time when at", "at {1}", "时间{1}"),
    ("int", "count times number amount", "{1} times", "{1}次"),
    ("int", "limit size pages", "with {names} {1}", "{names} 为{1}"),
    ("word", "label tag group", "with the {names} {1}", "{names} 用{1}"),
    ("name", "target destination", "to {1}", "到{1}"),
    ("phrase", "comment reason text", 'with the {names} "{1}"', "{names} 写“{1}”"),
    ("level", "priority level", "with {names} {1}", "{names} 是{1}"),
)
_FIRST = (
    ("int", "id number"),
    ("name", "name title"),
    ("word", "key label"),
    ("code", "code reference"),
    ("song", "title name"),
    ("person", "owner name"),
)


def made_up_family(rng: Random, language: str = "en", test: bool = False) -> Family:
    """A function named after a verb and a noun, such as ``close_ticket``, with one or two parameters to copy.

    ``test`` gives one of the pairs that training never sees, with one parameter.
    """
    words = lists("values.txt")
    verb, noun = rng.choice(words["new"]).split()
    while not test and f"{verb} {noun}" in words["new"]:
        verb, noun = rng.choice(words["verb"]), rng.choice(words["noun"])
    kind, names = rng.choice(_FIRST[:4] if test else _FIRST)
    first = names.split()[0]
    parameters = [Parameter((*names.split(), f"{noun}_{first}"), kind, f"The {first} of the {noun}")]
    chinese = dict(pair.split("=") for name in ("zh verb", "zh noun") for pair in words[name])
    act, thing = chinese[verb], chinese[noun]
    do = f"{verb} the {noun} {{0}}"
    asks = (do, f"{verb} {noun} {{0}}", f"please {verb} {noun} {{0}}", f"can you {do}", f"i want to {do}")
    zh = (
        f"{act}{thing}{{0}}",
        f"[请|帮我|我要|]{act}{thing}{{0}}",
        f"把{thing}{{0}}{act}",
        f"{thing}{{0}}，{act}[一下|]",
    )
    if not test and rng.random() < 0.4:
        kind, names, en_tells, zh_tells = rng.choice(_SECOND)
        name = rng.choice([name for name in names.split() if all(name not in p.names for p in parameters)])
        parameters.append(Parameter((name,), kind, f"The {name}"))
        tell, zh_tell = en_tells.replace("{names}", name), zh_tells.replace("{names}", name)
        asks = (
            f"[please |can you |i want to |we should |]{verb} [the |]{noun} {{0}} {tell}",
            f"{tell}, {verb} [the |]{noun} {{0}}",
            f"the {noun} {{0}} [should be handled|is next|needs it] {tell}: {verb} it",
            f"{noun} {{0}} {tell}, [{verb}|{verb} it|please {verb} that]",
            f"{verb} a {noun} {tell}, [its|the] {first} is {{0}}",
            f"{first} {{0}} [of|for] the {noun}, {tell}, [{verb} it|{verb}]",
        )
        zh = (
            f"[请|帮我|我要|麻烦|]{act}{thing}{{0}}，{zh_tell}",
            f"{zh_tell}，{act}{thing}{{0}}",
            f"[想|打算|需要|]把{thing}{{0}}{act}[一下|掉|]，{zh_tell}",
            f"{thing}{{0}}[要|该|需要|]{act}，{zh_tell}",
            f"{thing}{{0}}，{zh_tell}，[请|麻烦|帮我|]{act}[一下|]",
        )
    elif not test:
        asks += (
            f"{do} [now|for me|please|, thanks|today|right away|if you can]",
            f"the {noun} {{0}} [must|should] be handled: {verb} it",
            f"{noun} {{0}}: [please |]{verb} [it|that one|this]",
            f"there is [a|this] {noun} [called|named|with the {first}|] {{0}}, [please |]{verb} it [now|for me|]",
            f"[i need|i'd like|we want|i could do with] you to {verb} [the|our|my] {noun} {{0}}",
            f"{{0}} is the {noun} [to {verb}|that i want to {verb}|i would {verb}]",
            f"[time to|let's|could you|would you|go and|just] {verb} [the|my|our|] {noun} {{0}} [please|now|then|]",
            f'{verb} [the|my|] {noun} [named |called |]"{{0}}" [now|please|for me|]',
            f"the {noun} i want to {verb} is {{0}}",
            f"{verb} that {noun}, [its|the] {first} is {{0}}",
            f"with {first} {{0}} there is a {noun}, {verb} it",
        )
        zh += (
            f"[想|打算|需要|麻烦|现在|能不能|可以]{act}[一下|]{thing}{{0}}[吗|吧|]",
            f"{thing}{{0}}[要|该|需要|可以|应该]{act}[了|一下|]",
            f"[请|麻烦|帮忙|]将{thing}{{0}}[给我|]{act}[一下|掉|了|]",
            f"有个{thing}[叫|是|]{{0}}，[请|帮我|麻烦|]{act}[一下|]",
            f"{{0}}这个{thing}[请|要|麻烦|帮我]{act}[一下|]",
            f"[{act}|要{act}|想{act}]的{thing}是{{0}}",
            f"{thing}“{{0}}”[请|帮我|]{act}[一下|]",
            f"对{thing}{{0}}[进行|做一下|执行]{act}",
        )
    said = " with {1}" if len(parameters) == 2 else ""
    zh_said = "（{1}）" if len(parameters) == 2 else ""
    return Family(
        (f"{verb}_{noun}",),
        (f"{verb.capitalize()} a {noun}", f"{verb.capitalize()} the {noun} by {first}"),
        tuple(parameters),
        asks,
        zh,
        asks,
        zh,
        (("status", "done"),),
        f"The request to {verb} the {noun} {{0}}{said} is done.",
        f"{act}{thing}{{0}}{zh_said}的请求已完成。",
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


# How often words are put before a request, after it, and beside one of its values.
BEFORE, AFTER, BESIDE = 0.3, 0.3, 0.12


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
        marked = last is not None and family.parameters[int(last[1])].kind in _OPEN
        words = rng.choice([words for words in phrases(language, "request after") if not marked or words[0] in ",，"])
        ask += words if words[0] in ",，" else gap + words
    if rng.random() < BEFORE:
        marked = first is not None and family.parameters[int(first[1])].kind in _OPEN
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
        if free and kind not in _OPEN | {"expression", "command"}:
            found.append((match, kind))
    if not found:
        return ask
    match, kind = rng.choice(found)
    word = rng.choice(phrases(language, "request beside") + (phrases("en", "strange words") if gap else ()))
    # a number is followed by what it counts
    if kind in ("int", "number") or rng.random() < 0.3:
        return ask[: match.start()] + word + gap + ask[match.start() :]
    return ask[: match.end()] + gap + word + ask[match.end() :]


def draw_case(rng: Random, language: str, test: str = "") -> ToolCase:
    """A random request with one to three tools.

    ``test`` selects what training never sees: "phrases" for requests in other words, "functions" for unknown functions.
    """
    way = rng.random()
    if test == "functions" or (not test and way < 0.27):
        family = made_up_family(rng, language, test == "functions")
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
