"""Structural tags: free text in which certain strings begin a part of a given form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from nanovllm.errors import ParameterError

ANY_TEXT = r"/(.|\n)*/"

_KIND = "structured_outputs.structural_tag"


def tags_to_lark(tag: Any, tokens: Mapping[str, int]) -> str:
    """A Lark grammar of the tags.

    Two notations: ``{"structures": [{"begin", "schema", "end"}, ...], "triggers": [...]}``, and ``{"format": ...}``
    with a tree of "const_string", "json_schema", "regex", "grammar", "any_text", "sequence", "or", "tag" and
    "triggered_tags".

    Args:
        tokens: texts that are tokens of their own, and their ids.

    Raises:
        ParameterError: anything else.
    """
    if not isinstance(tag, dict):
        raise ParameterError("a structural tag must be a JSON object", _KIND, tag)
    if "format" in tag:
        rules = _Rules(tokens)
        return rules.grammar(rules.expression(tag["format"]))
    if "structures" not in tag:
        raise ParameterError("a structural tag needs 'structures' and 'triggers', or 'format'", _KIND, sorted(tag))
    tags = [
        {"begin": item.get("begin"), "end": item.get("end"), "content": _schema(item.get("schema", {}))}
        for item in _objects(tag["structures"], "structures")
    ]
    rules = _Rules(tokens)
    return rules.grammar(rules.triggered(tags, tag.get("triggers"), at_least_one=False))


def _schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": schema}


def _objects(items: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise ParameterError(f"{name!r} must be a non-empty list of objects", _KIND, items)
    return items


class _Rules:
    """Rules of a grammar while it is written."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._rules: list[str] = []
        self._tokens = tokens
        longest_first = sorted(tokens, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if tokens else None

    def grammar(self, start: str) -> str:
        """The whole, with ``start`` as its start rule."""
        return "\n".join([f"start: {start}", *self._rules, ""])

    def _rule(self, body: str, options: str = "") -> str:
        name = f"rule_{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def expression(self, node: Any) -> str:
        """A node of the tree as the right-hand side of a rule."""
        if not isinstance(node, dict):
            raise ParameterError("a format must be an object with a 'type'", _KIND, node)
        kind = node.get("type")
        if kind == "const_string":
            return self._text(node.get("value"))
        if kind == "json_schema":
            return f"%json {json.dumps(node.get('json_schema'))}"
        if kind == "regex":
            return self._terminal(f"/{_slashed(node.get('pattern'))}/")
        if kind == "grammar":
            return f"%lark {{\n{node.get('grammar')}\n}}"
        if kind == "any_text":
            return self._terminal(ANY_TEXT)
        if kind == "sequence":
            return " ".join(self._rule(self.expression(item)) for item in _objects(node.get("elements"), "elements"))
        if kind == "or":
            return " | ".join(self._rule(self.expression(item)) for item in _objects(node.get("elements"), "elements"))
        if kind == "tag":
            return self._tag(node, "")
        if kind == "triggered_tags":
            if node.get("stop_after_first"):
                raise ParameterError("stop_after_first is not supported", _KIND, node)
            tags = _objects(node.get("tags"), "tags")
            return self.triggered(tags, node.get("triggers"), at_least_one=bool(node.get("at_least_one")))
        raise ParameterError(f"a format of type {kind!r} is not supported", _KIND, node)

    def triggered(self, tags: list[dict[str, Any]], triggers: Any, at_least_one: bool) -> str:
        """Free text; once it has come to a trigger, one of the tags that begin with it must follow."""
        if not isinstance(triggers, list) or not triggers or not all(isinstance(t, str) and t for t in triggers):
            raise ParameterError("'triggers' must be a non-empty list of strings", _KIND, triggers)
        alternatives = []
        for tag in tags:
            begin = tag.get("begin")
            trigger = next((t for t in triggers if isinstance(begin, str) and begin.startswith(t)), None)
            if trigger is None:
                raise ParameterError("a tag must begin with one of the triggers", _KIND, begin)
            alternatives.append(f"{self._text_up_to(trigger)} {self._tag(tag, trigger)}")
        tail = self._terminal(ANY_TEXT)
        return f"{self._rule(' | '.join(alternatives))}{'+' if at_least_one else '*'} {tail}"

    def _tag(self, tag: dict[str, Any], begun: str) -> str:
        begin, end = tag.get("begin"), tag.get("end")
        if not isinstance(begin, str) or not isinstance(end, str):
            raise ParameterError("a tag needs 'begin', 'content' and 'end'", _KIND, tag)
        opening, content = self._text(begin[len(begun) :]), tag.get("content")
        if isinstance(content, dict) and content.get("type") == "any_text" and end:
            return f"{opening} {self._text_up_to(end)}"
        return f"{opening} {self._rule(self.expression(content))} {self._text(end)}"

    def _text_up_to(self, end: str) -> str:
        """Any text, and ``end`` where it first occurs."""
        if end in self._tokens:  # which no text holds
            return self._rule(f"{ANY_TEXT} {self._text(end)}")
        return self._rule(f"{ANY_TEXT} {_quoted(end)}", "[lazy]")

    def _terminal(self, body: str) -> str:
        name = f"TEXT_{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def _text(self, value: Any) -> str:
        """A string, in it the tokens of their own."""
        if not isinstance(value, str):
            raise ParameterError("a string is needed", _KIND, value)
        parts = [value] if self._split is None else self._split.split(value)
        ids = self._tokens
        return " ".join(f"<[{ids[part]}]>" if part in ids else _quoted(part) for part in parts if part)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _slashed(pattern: Any) -> str:
    if not isinstance(pattern, str):
        raise ParameterError("'pattern' must be a string", _KIND, pattern)
    from llguidance import regex_to_lark

    return regex_to_lark(pattern, "dws")
