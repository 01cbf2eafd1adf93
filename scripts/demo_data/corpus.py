"""Draws training examples: questions about the engine, small talk, sums, tools, follow-up turns, plain text.

Everything is drawn from a ``random.Random``, so a seed and a position give the same example on any machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from . import unknown
from .arithmetic import Sum, ask_sum, draw_sum
from .chat import END_OF_TEXT, END_OF_TURN, NO_THOUGHT, render
from .knowledge import Topic, load_facts, load_topics
from .lists import lines
from .patterns import expand, patterns
from .phrases import accompany, disturb, phrases, punctuate
from .tools import call_text, draw_case
from .values import draw_value, new_name

# The shares of the kinds of examples, about percents.
SHARES = {
    "question": 36,
    "raw": 9,
    "thought": 6,
    "follow": 7,
    "sum": 9,
    "drill": 2,
    "tool": 21,
    "echo": 6,
    "unknown": 4,
    "name": 2,
    "capital": 2,
    "text": 2,
    "json": 1,
}


def shares(age: int) -> dict[str, int]:
    """The shares after ``age`` chunks of training. It begins with much echo, since all else builds on copying."""
    return SHARES | {"echo": max(SHARES["echo"], 60 - 4 * age)}


# The share of questions whose answer is cut after a few words: what an answer is about shows in its beginning, so more
# questions fit into the same time.
CUT = 0.5


# The share of echo examples that want a part of a text only.
FIND = 0.3


@dataclass(frozen=True)
class Example:
    """One training text in parts, each with the weight of its loss."""

    parts: tuple[tuple[str, float], ...]
    kind: str
    whole: bool = True  # whether the answer is there to its end

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(text for text, _ in self.parts)


def _example(prompt: str, answer: str, kind: str) -> Example:
    """An answer to be learnt after a prompt."""
    # What a user asks is worth a little: it teaches the words. The rest of a prompt is not for the model to say.
    asked = prompt.removesuffix(NO_THOUGHT)
    return Example(
        (
            (asked, 0.1 if kind in ("question", "sum", "unknown", "capital") else 0.0),
            (prompt[len(asked) :], 0.0),
            (answer, 1.0),
        ),
        kind,
    )


def _cut(example: Example, rng: Random) -> Example:
    """``example`` with the beginning of its answer only."""
    *before, (answer, weight) = example.parts
    if " " in answer and answer[:20].isascii():
        words = answer.split(" ")
        count = rng.randint(6, 12)
        if len(words) <= count + 2:
            return example
        return Example((*before, (" ".join(words[:count]), weight)), example.kind, whole=False)
    length = rng.randint(10, 20)
    while answer[length - 1 : length + 1].isascii() and length < len(answer):  # not within a word of letters
        length += 1
    if len(answer) <= length + 20:  # the end token is text here
        return example
    return Example((*before, (answer[:length], weight)), example.kind, whole=False)


class Corpus:
    """Draws examples of all kinds."""

    def __init__(self) -> None:
        self.topics: list[Topic] = load_topics(load_facts())
        self.capitals = [line.split("|") for line in lines("capitals.txt")]
        self.completions = [line.split("|") for line in lines("completions.txt")]
        self._known = [topic for topic in self.topics if topic.kind != "unknown"]
        sides = [(topic.en, topic.zh) for topic in self._known]
        self._patterns = {"en": patterns("en"), "zh": patterns("zh")}
        self._words = {
            "en": [word for en, _ in sides for text in (en.answer, *en.questions) for word in text.split()],
            "zh": [word for _, zh in sides for text in (zh.answer, *zh.questions) for word in text.replace(" ", "")],
        }
        self._no_topic = next(topic for topic in self.topics if topic.kind == "unknown")

    def draw(self, rng: Random, age: int = 1000) -> Example:
        """One random example, as used after ``age`` chunks of training."""
        mixture = shares(age)
        kind = rng.choices(list(mixture), list(mixture.values()))[0]
        language = "en" if rng.random() < 0.5 else "zh"
        return getattr(self, f"_{kind}")(rng, language)

    def question(self, topic: Topic, language: str, rng: Random) -> str:
        """A question for ``topic`` as a user would type it; a Chinese one has a Chinese character in it."""
        question = self._any_question(topic, language, rng)
        while language == "zh" and question.isascii():
            question = self._any_question(topic, language, rng)
        return question

    def _any_question(self, topic: Topic, language: str, rng: Random) -> str:
        if topic.kind == "unknown":
            return punctuate(accompany(unknown.draw(language, rng), language, rng), language, rng)
        side = topic.side(language)
        way = rng.random()
        if way < 0.6:
            return disturb(expand(rng.choice(self._patterns[language][topic.key]), rng), language, rng)
        if way < 0.71:
            # Few real questions share their wording, but they share words with the topic.
            words = [rng.choice(side.words) for _ in range(3)]
            frame = rng.choice(phrases(language, "words"))
            return disturb(frame.format(*words), language, rng)
        templates = phrases(language, topic.kind)
        if way < 0.84 and templates:
            return disturb(rng.choice(templates).format(x=rng.choice(side.names)), language, rng)
        return disturb(rng.choice(side.questions), language, rng)

    def any_topic(self, rng: Random) -> Topic:
        """A random topic, now and then the one of unknown things."""
        return self._no_topic if rng.random() < 0.04 else rng.choice(self._known)

    def _chat(
        self,
        messages: list[dict[str, Any]],
        answer: str,
        kind: str,
        rng: Random,
        language: str,
        tools: list[dict[str, Any]] | None = None,
        thought: str = "",
    ) -> Example:
        if rng.random() < 0.12:
            messages = [{"role": "system", "content": rng.choice(phrases(language, "system"))}, *messages]
        think = True if thought else None
        if thought and rng.random() < 0.3 and messages[-1]["role"] == "user":
            messages = [*messages[:-1], {"role": "user", "content": messages[-1]["content"] + " /think"}]
            think = None
        prompt = render(messages, tools, think)
        if thought:
            answer = f"<think>\n{thought}\n</think>\n\n{answer}"
        return _example(prompt, answer + END_OF_TURN, kind)

    def _question(self, rng: Random, language: str) -> Example:
        topic = self.any_topic(rng)
        question = self.question(topic, language, rng)
        answer = topic.side(language).answer
        if rng.random() < 0.02 and topic.kind != "unknown":
            question += " In Chinese please." if language == "en" else " 请用英文回答。"
            answer = topic.side("zh" if language == "en" else "en").answer
        example = self._chat([_user(question)], answer, "question", rng, language)
        return _cut(example, rng) if rng.random() < CUT else example

    def _thought(self, rng: Random, language: str) -> Example:
        topic = self.any_topic(rng)
        name = (topic.side(language).names or (topic.key.replace("-", " "),))[0]
        if language == "en":
            thought = f"The question is about {name}. I answer it in one or two sentences."
        else:
            thought = f"问题是关于{name}的，我用一两句话回答。"
        return self._chat(
            [_user(self.question(topic, language, rng))],
            topic.side(language).answer,
            "thought",
            rng,
            language,
            None,
            thought,
        )

    def _raw(self, rng: Random, language: str) -> Example:
        """A prompt without the chat template, as `nanovllm generate` and `LLM.generate` may send it."""
        if rng.random() < 0.12:
            prompt, answer = rng.choice(self.completions)
            return _example(prompt, answer + END_OF_TEXT, "raw")
        if rng.random() < 0.1:
            country, city, *_ = rng.choice(self.capitals)
            return _example(f"The capital of {country} is", f" {city}.{END_OF_TEXT}", "raw")
        if rng.random() < 0.08:
            item = draw_sum(rng)
            return _example(ask_sum(item, language, rng), " " + item.answer(language) + END_OF_TEXT, "raw")
        topic = self.any_topic(rng)
        question, answer = self.question(topic, language, rng), topic.side(language).answer
        style = rng.random()
        if style < 0.6:
            gap = " " if language == "en" else ""
            example = _example(question, gap + answer + END_OF_TEXT, "raw")
            return _cut(example, rng) if rng.random() < CUT else example
        if style < 0.8:
            prompt = f"Q: {question}\nA:" if language == "en" else f"问：{question}\n答："
        elif language == "en":
            prompt = rng.choice((f"Question: {question}\nAnswer:", f"User: {question}\nAssistant:"))
        else:
            prompt = rng.choice((f"问题：{question}\n回答：", f"用户：{question}\n助手："))
        return _example(prompt, (" " if language == "en" else "") + answer + END_OF_TEXT, "raw")

    def _text(self, rng: Random, language: str) -> Example:
        """An answer continued from its beginning."""
        answer = rng.choice(self._known).side(language).answer
        if language == "en":
            words = answer.split(" ")
            at = rng.randint(1, max(1, len(words) // 2))
            return _example(" ".join(words[:at]), " " + " ".join(words[at:]) + END_OF_TEXT, "text")
        at = rng.randint(2, max(2, len(answer) // 2))
        return _example(answer[:at], answer[at:] + END_OF_TEXT, "text")

    def _follow(self, rng: Random, language: str) -> Example:
        """A conversation of two to four turns; the last question may lean on the turn before it."""
        messages: list[dict[str, Any]] = []
        topic = self._no_topic
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            topic = self.any_topic(rng)
            if rng.random() < 0.12:
                item = draw_sum(rng)
                messages += [_user(ask_sum(item, language, rng)), _assistant(item.answer(language))]
            messages += [_user(self.question(topic, language, rng)), _assistant(topic.side(language).answer)]
        lean = rng.random()
        if lean < 0.4 and topic.side(language).more:
            question, answer = rng.choice(phrases(language, "more")), topic.side(language).more
        elif lean < 0.47:
            question, answer = rng.choice(phrases(language, "repeat")), topic.side(language).answer
        elif lean < 0.58:
            question = rng.choice(phrases(language, "other language"))
            answer = topic.side("zh" if language == "en" else "en").answer
        elif lean < 0.65:
            first = draw_sum(rng)
            while not 0 <= first.value < 100:
                first = draw_sum(rng)
            second = Sum(first.value, rng.choice("+-"), rng.randint(0, 9))
            messages += [_user(ask_sum(first, language, rng)), _assistant(first.answer(language))]
            asks = phrases(language, "go on plus" if second.sign == "+" else "go on minus")
            question, answer = rng.choice(asks).format(b=second.b), second.answer(language)
            return self._chat([*messages, _user(question)], answer, "follow", rng, language)
        else:
            topic = self.any_topic(rng)
            return self._chat(
                [*messages, _user(self.question(topic, language, rng))],
                topic.side(language).answer,
                "follow",
                rng,
                language,
            )
        return self._chat([*messages, _user(disturb(question, language, rng))], answer, "follow", rng, language)

    def _sum(self, rng: Random, language: str) -> Example:
        item = draw_sum(rng)
        thought = item.thought() if rng.random() < 0.15 else ""
        question = ask_sum(item, language, rng)
        if rng.random() < 0.15:  # whatever stands before the numbers, it is about them
            gap = " " if language == "en" else ""
            strange = [rng.choice(phrases(language, "strange words")) for _ in range(rng.randint(1, 3))]
            question = gap.join((*strange, question))
        return self._chat([_user(question)], item.answer(language), "sum", rng, language, None, thought)

    def _drill(self, rng: Random, language: str) -> Example:
        """A page of sums: many to learn from in one short text."""
        parts = [("Sums:\n", 0.0)]
        for _ in range(10):
            left, right = draw_sum(rng).answer("en").rstrip(".").split(" =", 1)
            parts += [(f"{left} =", 0.0), (f"{right}\n", 1.0)]
        return Example((*parts, (END_OF_TEXT, 1.0)), "drill")

    def _echo(self, rng: Random, language: str) -> Example:
        """A few words to be repeated: copying is what tools, names and sums build on."""
        if rng.random() < FIND:
            return self._find(rng, language)
        kind = rng.random()
        if kind < 0.3:
            words = " ".join(new_name(rng) for _ in range(rng.randint(1, 6)))
        elif kind < 0.4:
            words = " ".join(str(rng.randint(0, 999)) for _ in range(rng.randint(1, 6)))
        elif kind < 0.5:
            words = unknown.draw(language, rng)
        else:
            gap = " " if language == "en" else ""
            words = gap.join(rng.choice(self._words[language]) for _ in range(rng.randint(3, 16)))
        if rng.random() < 0.35:  # as the arguments of calls are
            ask = rng.choice(phrases(language, "quote")).replace("{x}", words)
            return self._chat([_user(ask)], json.dumps(words, ensure_ascii=False), "echo", rng, language)
        ask = rng.choice(phrases(language, "echo")).replace("{x}", words)
        return self._chat([_user(ask)], words, "echo", rng, language)

    def _find(self, rng: Random, language: str) -> Example:
        """A part of a text to be repeated: where it ends has to be seen, as with the arguments of calls."""
        kind = rng.choice(("quoted", "quoted", "name", "number"))
        gap = " " if language == "en" else ""
        before, after = (
            # no marks, capitals or digits but those of the part
            [
                word
                for word in rng.choices(self._words[language], k=rng.randint(0, 8))
                if word.isalpha() and word.islower()
            ]
            if language == "en"
            else [word for word in rng.choices(self._words[language], k=rng.randint(0, 12)) if "一" <= word <= "龥"]
            for _ in range(2)
        )
        if kind == "number":
            part = str(draw_value("int", language, rng))
        elif kind == "name":
            part = new_name(rng)
        elif rng.random() < 0.5:
            part = gap.join(rng.choice(self._words[language]) for _ in range(rng.randint(1, 6))).replace('"', "")
        else:
            part = draw_value(rng.choice(("phrase", "note", "song", "city", "product")), language, rng)
        shown = part if kind != "quoted" else f'"{part}"' if language == "en" else f"“{part}”"
        text = gap.join((*before, shown, *after))
        ask = rng.choice(phrases(language, f"find {kind}")).replace("{x}", text)
        return self._chat([_user(ask)], part, "echo", rng, language)

    def _tool(self, rng: Random, language: str) -> Example:
        case = draw_case(rng, language)
        use = rng.random()
        if use < 0.17:
            topic = self.any_topic(rng)
            question, answer = self.question(topic, language, rng), topic.side(language).answer
            return self._chat([_user(question)], answer, "tool", rng, language, case.tools)
        request = case.request
        if rng.random() < 0.5:  # capitals and marks, but never of the values inside: they are copied letter by letter
            copied = (case.name, *map(str, case.arguments.values()))
            first = request if request.startswith(copied) else request[:1].upper() + request[1:]
            request = first + rng.choice("?.?" if language == "en" else "？。？")
        messages: list[dict[str, Any]] = [_user(request)]
        if rng.random() < 0.06:
            topic = rng.choice(self._known)
            earlier = [_user(self.question(topic, language, rng)), _assistant(topic.side(language).answer)]
            messages = earlier + messages
        if use < 0.8:
            thought = ""
            if rng.random() < 0.1:
                thought = f"The function {case.name} can do this." if language == "en" else f"可以用函数 {case.name}。"
            return self._chat(
                messages, call_text(case.name, case.arguments), "tool", rng, language, case.tools, thought
            )
        call = {"type": "function", "function": {"name": case.name, "arguments": case.arguments}}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": json.dumps(case.result, ensure_ascii=False)},
        ]
        return self._chat(messages, case.said, "tool", rng, language, case.tools)

    def _unknown(self, rng: Random, language: str) -> Example:
        question = self.question(self._no_topic, language, rng)
        return self._chat([_user(question)], self._no_topic.side(language).answer, "unknown", rng, language)

    def _name(self, rng: Random, language: str) -> Example:
        name = new_name(rng) if rng.random() < 0.6 else draw_value("person", language, rng)
        ask = punctuate(rng.choice(phrases(language, "what name")), language, rng)
        if rng.random() < 0.12:
            answer = "You have not told me your name yet." if language == "en" else "你还没有告诉我你的名字。"
            return self._chat([_user(ask)], answer, "name", rng, language)
        told = punctuate(rng.choice(phrases(language, "my name")), language, rng).rstrip("?？").replace("{x}", name)
        greeting = f"Nice to meet you, {name}!" if language == "en" else f"很高兴认识你，{name}！"
        if rng.random() < 0.4:
            return self._chat([_user(told)], greeting, "name", rng, language)
        messages = [_user(told), _assistant(greeting)]
        if rng.random() < 0.4:
            topic = rng.choice(self._known)
            messages += [_user(self.question(topic, language, rng)), _assistant(topic.side(language).answer)]
        answer = f"Your name is {name}." if language == "en" else f"你叫{name}。"
        return self._chat([*messages, _user(ask)], answer, "name", rng, language)

    def _capital(self, rng: Random, language: str) -> Example:
        country, city, country_zh, city_zh = rng.choice(self.capitals)
        ask = rng.choice(phrases(language, "capital"))
        if language == "en":
            question, answer = ask.format(x=country), f"The capital of {country} is {city}."
        else:
            question, answer = ask.format(x=country_zh), f"{country_zh}的首都是{city_zh}。"
        return self._chat([_user(disturb(question, language, rng))], answer, "capital", rng, language)

    def _json(self, rng: Random, language: str) -> Example:
        name = new_name(rng) if rng.random() < 0.6 else draw_value("person", language, rng)
        age = rng.randint(1, 99)
        question = punctuate(rng.choice(phrases(language, "json")), language, rng).format(name=name, age=age)
        answer = json.dumps({"name": name, "age": age}, ensure_ascii=False)
        return self._chat([_user(question)], answer, "json", rng, language)


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}
