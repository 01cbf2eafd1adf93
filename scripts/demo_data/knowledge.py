"""Reads the topic files: what the demo model knows, in English and Chinese.

A topic file is plain text. ``= key | kind`` opens a topic; the lines below it are ``field: value``, lists are
separated by ``;``. A value may name a fact of ``facts.json`` in braces, ``{block_size}``, so a changed default changes
the answers at the next training.

======== ======== =====================================================================================
English  Chinese  meaning
======== ======== =====================================================================================
en       zh       names of the topic, put into the question templates of its kind
q        zq       questions of its own, for training
w        zw       words that belong to it, to be thrown into the word templates
test     ztest    questions of its own that training never sees
a        za       the answer
k        zk       key phrases of the answer, all of which (``&``) a right answer contains
m        zm       what is said when asked for more (optional)
======== ======== =====================================================================================
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from .lists import DATA, items

TOPIC_FILES = ("topics_engine.txt", "topics_inference.txt", "smalltalk.txt")
KINDS = ("concept", "howto", "value", "ability", "free", "unknown")


@dataclass(frozen=True)
class Side:
    """A topic in one language."""

    names: tuple[str, ...]
    questions: tuple[str, ...]
    words: tuple[str, ...]
    test_questions: tuple[str, ...]
    answer: str
    keys: tuple[str, ...]
    more: str


@dataclass(frozen=True)
class Topic:
    """One thing the model knows; ``kind`` selects the question templates."""

    key: str
    kind: str
    en: Side
    zh: Side

    def side(self, language: str) -> Side:
        """The topic in ``language``, "en" or "zh"."""
        return self.en if language == "en" else self.zh


def load_facts() -> dict[str, str]:
    """The facts of this project that appear in answers, by name."""
    return json.loads((DATA / "facts.json").read_text(encoding="utf-8"))


def load_topics(facts: dict[str, str] | None = None) -> list[Topic]:
    """All topics of the topic files, facts filled in.

    Raises:
        ValueError: a topic lacks a field, names an unknown one, or its answer lacks its own key phrases.
    """
    facts = load_facts() if facts is None else facts
    topics: list[Topic] = []
    for name in TOPIC_FILES:
        text = (DATA / name).read_text(encoding="utf-8")
        for block in ("\n" + text).split("\n= ")[1:]:
            topics.append(_parse(block, facts))
    keys = [topic.key for topic in topics]
    if len(set(keys)) != len(keys):
        raise ValueError(f"topic keys are not unique: {sorted(key for key in keys if keys.count(key) > 1)}")
    return topics


def holds(answer: str, keys: tuple[str, ...]) -> bool:
    """Whether ``answer`` contains every key phrase, whatever the case."""
    return all(key.lower() in answer.lower() for key in keys)


def _parse(block: str, facts: dict[str, str]) -> Topic:
    head, *lines = block.splitlines()
    key, kind = (part.strip() for part in head.split("|"))
    if kind not in KINDS:
        raise ValueError(f"topic {key}: unknown kind {kind!r}")
    fields: dict[str, str] = {}
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        field, _, value = line.partition(":")
        for fact, fact_value in facts.items():
            value = value.replace("{" + fact + "}", fact_value)
        if field in fields:
            raise ValueError(f"topic {key}: field {field} is given twice")
        fields[field] = value.strip()
    sides = {}
    for language, prefix in (("en", ""), ("zh", "z")):
        side = Side(
            names=items(fields.pop(language, "")),
            questions=items(fields.pop(prefix + "q", "")),
            words=items(fields.pop(prefix + "w", "")),
            test_questions=items(fields.pop(prefix + "test", "")),
            answer=fields.pop(prefix + "a"),
            keys=tuple(part.strip() for part in fields.pop(prefix + "k").split("&")),
            more=fields.pop(prefix + "m", ""),
        )
        if not holds(side.answer, side.keys):
            raise ValueError(f"topic {key}: the answer lacks its key phrase {side.keys}: {side.answer}")
        sides[language] = side
    if fields:
        raise ValueError(f"topic {key}: unknown fields {sorted(fields)}")
    return Topic(key, kind, sides["en"], sides["zh"])
