"""Functions that nobody knows: their names and parameters have to be read from their schemas."""

from __future__ import annotations

from random import Random

from .families import Family, Parameter
from .lists import lists
from .values import new_name

# What tells which thing is meant: kind and names of the parameter.
_FIRST = (
    ("int", "id number"),
    ("name", "name title"),
    ("word", "key label"),
    ("code", "code reference"),
    ("song", "title name"),
    ("person", "owner name"),
)
# What else a function may want: kind, names, and how requests in English and Chinese tell it. # stands for the name.
_MORE = (
    ("person", "user person assignee guest", "for {}", "给{}"),
    ("person", "sender author", "from {}", "来自{}"),
    ("person", "partner companion", "together with {}", "和{}一起"),
    ("city", "city place location site", "in {}", "在{}"),
    ("city", "target destination", "to {}", "到{}"),
    ("country", "country nation", "in {}", "在{}"),
    ("room", "room area", "in the {}", "在{}"),
    ("clock", "time when at", "at {}", "时间{}"),
    ("clock", "start begin", "starting at {}", "{}开始"),
    ("int", "count times", "{} times", "{}次"),
    ("int", "days duration", "for {} days", "{}天"),
    ("int", "people persons seats", "for {} people", "{}个人"),
    ("int", "limit size pages", "with # {}", "# 为{}"),
    ("number", "price amount", "for {} dollars", "{}美元"),
    ("word", "tag group category", "with the # {}", "# 用{}"),
    ("name", "brand", "by {}", "{}牌"),
    ("topic", "topic theme", "about {}", "关于{}"),
    ("product", "product item", "with {}", "带{}"),
    ("phrase", "comment reason text", 'with the # "{}"', "# 写“{}”"),
    ("level", "priority level", "with # {}", "# 是{}"),
)


def made_up_family(rng: Random, test: bool = False) -> Family:
    """A function named after a verb and a noun, such as ``close_ticket``, with one to three parameters to copy.

    ``test`` gives one of the pairs that training never sees, with one parameter and plain requests.
    """
    words = lists("values.txt")
    verb, noun = rng.choice(words["new"]).split()
    while not test and f"{verb} {noun}" in words["new"]:
        verb, noun = rng.choice(words["verb"]), rng.choice(words["noun"])
    chinese = dict(pair.split("=") for name in ("zh verb", "zh noun") for pair in words[name])
    act, thing = chinese[verb], chinese[noun]

    more = 0 if test else rng.choices((0, 1, 2), (50, 38, 12))[0]
    parameters, en_tells, zh_tells = [], [], []
    if not more or rng.random() < 0.55:
        kind, names = rng.choice(_FIRST[:4] if test else _FIRST)
        first = names.split()[0]
        parameters.append(Parameter((*names.split(), f"{noun}_{first}"), kind, f"The {first} of the {noun}"))
    headed = bool(parameters)
    for kind, names, en_tell, zh_tell in rng.sample(_MORE, more):
        name = rng.choice(names.split())
        place = f"{{{len(parameters)}}}"
        parameters.append(Parameter((name,), kind, f"The {name}"))
        en_tells.append(en_tell.replace("{}", place).replace("#", name))
        zh_tells.append(zh_tell.replace("{}", place).replace("#", name))

    what, zh_what = (f"{noun} {{0}}", f"{thing}{{0}}") if headed else (noun, thing)
    if more:
        en, zh = _told(verb, what, en_tells), _told_zh(act, zh_what, zh_tells)
    else:
        en, zh = _plain(verb, noun), _plain_zh(act, thing)
        if not test:
            en, zh = en + _named(verb, noun, first), zh + _named_zh(act, thing)
    said = " ".join((f"the request to {verb} the {what}", *en_tells))
    names_of_it = (
        (f"{verb}_{noun}",) if test else (*[f"{verb}_{noun}"] * 4, f"{verb}{noun.capitalize()}", f"{noun}_{verb}")
    )
    by = f"by {first}" if headed else "as asked"
    return Family(
        names_of_it,
        (f"{verb.capitalize()} a {noun}", f"{verb.capitalize()} the {noun} {by}"),
        tuple(parameters),
        en,
        zh,
        en,
        zh,
        (("status", "done"),),
        f"{said[:1].upper()}{said[1:]} is done.",
        "，".join((f"{act}{zh_what}", *zh_tells)) + "的请求已完成。",
    )


def _plain(verb: str, noun: str) -> tuple[str, ...]:
    do = f"{verb} the {noun} {{0}}"
    return (do, f"{verb} {noun} {{0}}", f"please {verb} {noun} {{0}}", f"can you {do}", f"i want to {do}")


def _plain_zh(act: str, thing: str) -> tuple[str, ...]:
    return (
        f"{act}{thing}{{0}}",
        f"[请|帮我|我要|]{act}{thing}{{0}}",
        f"把{thing}{{0}}{act}",
        f"{thing}{{0}}，{act}[一下|]",
    )


def _named(verb: str, noun: str, first: str) -> tuple[str, ...]:
    """Requests about one thing, known by its ``first`` parameter."""
    return (
        f"{verb} the {noun} {{0}} [now|for me|please|, thanks|today|right away|if you can]",
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


def _named_zh(act: str, thing: str) -> tuple[str, ...]:
    return (
        f"[想|打算|需要|麻烦|现在|能不能|可以]{act}[一下|]{thing}{{0}}[吗|吧|]",
        f"{thing}{{0}}[要|该|需要|可以|应该]{act}[了|一下|]",
        f"[请|麻烦|帮忙|]将{thing}{{0}}[给我|]{act}[一下|掉|了|]",
        f"有个{thing}[叫|是|]{{0}}，[请|帮我|麻烦|]{act}[一下|]",
        f"{{0}}这个{thing}[请|要|麻烦|帮我]{act}[一下|]",
        f"[{act}|要{act}|想{act}]的{thing}是{{0}}",
        f"{thing}“{{0}}”[请|帮我|]{act}[一下|]",
        f"对{thing}{{0}}[进行|做一下|执行]{act}",
    )


def _told(verb: str, what: str, tells: list[str]) -> tuple[str, ...]:
    """Requests about ``what`` that tell more in either order."""
    tail, liat = " ".join(tells), " ".join(reversed(tells))
    start = "[please |can you |i want to |i'd like to |we should |could you |let's |]"
    return (
        f"{start}{verb} [the |a |my |]{what} [{tail}|{liat}]",
        f"[{tail}|{liat}], {start}{verb} [the |a |my |]{what}",
        f"the {what} [should be handled|is next|needs it] [{tail}|{liat}]: {verb} it",
        f"{what} [{tail}|{liat}], [{verb}|{verb} it|please {verb} that]",
        f"i need [a|the] {what} [{tail}|{liat}] [now|today|please|], {verb} it",
        f"[i feel like|how about|we're thinking of] [a|the|this] {what} [{tail}|{liat}], [please |]{verb} [it|one]",
        f"{start}{verb} [the |a |]{what}, [{', '.join(tells)}|{', '.join(reversed(tells))}]",
    )


def _told_zh(act: str, what: str, tells: list[str]) -> tuple[str, ...]:
    tail, liat = "，".join(tells), "，".join(reversed(tells))
    return (
        f"[请|帮我|我要|麻烦|想|]{act}{what}，[{tail}|{liat}]",
        f"[{tail}|{liat}]，[请|帮我|]{act}{what}",
        f"[{tail}|{liat}][的|]{what}[请|帮我|麻烦|]{act}[一下|]",
        f"[想|打算|需要|]把{what}{act}[一下|掉|]，[{tail}|{liat}]",
        f"{what}[要|该|需要|]{act}，[{tail}|{liat}]",
        f"{what}，[{tail}|{liat}]，[请|麻烦|帮我|]{act}[一下|]",
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
