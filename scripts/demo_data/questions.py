"""The evaluation's questions: paraphrases, sums and tool requests that training never sees.

``held_out.txt`` and ``held_out_tools.txt`` were written when the training data was final. The test questions of the
topic files are older: training data was improved with an eye on their failures, so their groups are called
"development" and count for no goal.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from .arithmetic import Sum, ask_sum, draw_sum
from .chat import render
from .families import Family, families, load_families
from .knowledge import Topic, holds, load_topics
from .lists import lists
from .phrases import phrases
from .tools import ToolCase, draw_case, make_case
from .values import new_name


@dataclass(frozen=True)
class Question:
    """A prompt with the check of its answer."""

    group: str
    prompt: str
    shown: str  # what the report shows of the question
    right: Callable[[str], bool]


def questions(seed: int = 0, quick: bool = False) -> list[Question]:
    """The whole evaluation, or with ``quick`` about a fifth of it."""
    rng = Random(f"{seed}/evaluation")
    topics = [topic for topic in load_topics() if topic.kind != "unknown"]
    unknown = next(topic for topic in load_topics() if topic.kind == "unknown")
    found: list[Question] = []
    for language in ("en", "zh"):
        found += [
            _knowledge(topic, text, language, f"questions {language}")
            for topic in topics
            for text in held_out(language, topic.key)
        ]
        found += [
            _knowledge(topic, text, language, f"development {language}")
            for topic in topics
            for text in _test_texts(topic, language, rng)
        ]
        found += _unknown(unknown, language)
        asks = new_wordings(language)
        found += [_tool(make_case(*ask, language, rng), f"tools {language}") for ask in asks for _ in range(2)]
        found += [_after_tool(make_case(*ask, language, rng)) for ask in rng.sample(asks, 25)]
        found += [
            _tool(make_case(family, ask, language, rng), "tools, unseen functions")
            for family in load_families("held_out_tools.txt")
            for ask in (family.en, family.zh)[language == "zh"]
            for _ in range(2)
        ]
        found += [_tool(draw_case(rng, language, "phrases"), f"development, tools {language}") for _ in range(40)]
        found += [_thinking(topic, language, rng) for topic in rng.sample(topics, 25)]
        found += [
            _follow(topic, language, rng) for topic in rng.sample([t for t in topics if t.side(language).more], 25)
        ]
        found += [_raw(topic, language, rng) for topic in rng.sample(topics, 25)]
        found += [_beside_tools(topic, language, rng) for topic in rng.sample(topics, 25)]
        found += [_name(language, rng) for _ in range(15)]
        found += [_sum(draw_sum(rng, held_out=True), language, "sums, two digits", rng) for _ in range(100)]
    found += [_tool(draw_case(rng, "en", "functions"), "tools, unseen functions") for _ in range(30)]
    tables = [Sum(a, sign, b) for sign in "+*-" for a in range(10) for b in range(10) if sign != "-" or a >= b]
    found += [_sum(item, rng.choice(("en", "zh")), "sums, one digit", rng) for item in tables]
    if quick:
        rng.shuffle(found)
        found = found[: len(found) // 5]
    return found


def held_out(language: str, key: str) -> tuple[str, ...]:
    """The questions about the topic ``key`` that were written for the evaluation."""
    return lists("held_out.txt").get(f"{language} {key}", ())


def new_wordings(language: str) -> list[tuple[Family, str]]:
    """Requests in new words for functions that training knows."""
    asks = {family: lists("held_out.txt").get(f"{language} request {family.names[0]}", ()) for family in families()}
    return [(family, ask) for family, texts in asks.items() for ask in texts]


def _test_texts(topic: Topic, language: str, rng: Random) -> list[str]:
    side = topic.side(language)
    texts = list(side.test_questions)
    templates = phrases(language, f"test {topic.kind}")
    for template in rng.sample(templates, min(2, len(templates))):
        texts.append(template.format(x=rng.choice(side.names)))
    return [_typed(text, language, rng) for text in texts]


def _typed(text: str, language: str, rng: Random) -> str:
    if rng.random() < 0.5:
        return text
    return text[:1].upper() + text[1:] + ("?" if language == "en" else "？")


def _user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _knowledge(topic: Topic, text: str, language: str, group: str) -> Question:
    keys = topic.side(language).keys
    return Question(group, render(_user(text)), text, lambda answer: holds(answer, keys))


def _unknown(topic: Topic, language: str) -> list[Question]:
    keys = topic.side(language).keys
    return [
        Question("unknown things", render(_user(text)), text, lambda answer: holds(answer, keys))
        for text in held_out(language, "unknown")
    ]


def _sum(item: Sum, language: str, group: str, rng: Random) -> Question:
    text = ask_sum(item, language, rng, test=True)
    want = f"= {item.value}" + ("." if language == "en" else "。")
    return Question(group, render(_user(text)), text, lambda answer: answer.endswith(want))


def parse_call(answer: str) -> dict[str, Any] | None:
    """The call in ``answer``, or None if there is not exactly one valid call and nothing else."""
    if not (answer.startswith("<tool_call>\n") and answer.endswith("\n</tool_call>")):
        return None
    try:
        call = json.loads(answer.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    except json.JSONDecodeError:
        return None
    return call if isinstance(call, dict) and set(call) == {"name", "arguments"} else None


def _tool(case: ToolCase, group: str) -> Question:
    want = {"name": case.name, "arguments": case.arguments}
    shown = f"{case.request} [{case.name}]"
    return Question(group, render(_user(case.request), case.tools), shown, lambda answer: parse_call(answer) == want)


def _after_tool(case: ToolCase) -> Question:
    call = {"type": "function", "function": {"name": case.name, "arguments": case.arguments}}
    messages = [
        *_user(case.request),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": json.dumps(case.result, ensure_ascii=False)},
    ]
    return Question(
        "after a tool's answer", render(messages, case.tools), case.request, lambda answer: answer == case.said
    )


def _thinking(topic: Topic, language: str, rng: Random) -> Question:
    text, keys = rng.choice(held_out(language, topic.key)), topic.side(language).keys

    def right(answer: str) -> bool:
        thought, mark, said = answer.partition("</think>")
        return bool(mark) and bool(thought.removeprefix("<think>").strip()) and holds(said, keys)

    return Question("thinking", render(_user(text), think=True), text, right)


def _follow(topic: Topic, language: str, rng: Random) -> Question:
    side = topic.side(language)
    more = rng.choice(phrases(language, "test more"))
    messages = [*_user(rng.choice(side.questions)), {"role": "assistant", "content": side.answer}, *_user(more)]
    return Question("follow-up", render(messages), f"{topic.key}: {more}", lambda answer: answer == side.more)


def _raw(topic: Topic, language: str, rng: Random) -> Question:
    text, keys = rng.choice(held_out(language, topic.key)), topic.side(language).keys
    return Question("without chat template", text, text, lambda answer: holds(answer, keys))


def _beside_tools(topic: Topic, language: str, rng: Random) -> Question:
    text, keys = rng.choice(held_out(language, topic.key)), topic.side(language).keys
    tools = draw_case(rng, language).tools
    return Question("question beside tools", render(_user(text), tools), text, lambda answer: holds(answer, keys))


def _name(language: str, rng: Random) -> Question:
    name = new_name(rng)
    told, reply, ask = {
        "en": (f"Hello there, my name is {name}.", f"Nice to meet you, {name}!", "Could you tell me my name?"),
        "zh": (f"你好呀，我的名字叫{name}。", f"很高兴认识你，{name}！", "说说看，我叫什么名字？"),
    }[language]
    messages = [*_user(told), {"role": "assistant", "content": reply}, *_user(ask)]
    return Question("name in the conversation", render(messages), f"{told} {ask}", lambda answer: name in answer)
