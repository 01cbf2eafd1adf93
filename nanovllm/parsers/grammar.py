"""Writes grammars in llguidance's Lark notation (docs/syntax.md of that project)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.parsers.tools import Function

ANY_TEXT = r"/(.|\n)*/"
LINE_BREAK = r'"\n"'


@dataclass(frozen=True)
class Envelope:
    """How a format writes calls.

    Attributes:
        markers: texts that begin a call; the first is the one that is written. None: a call begins the answer.
        call: a call, or all of them, without the marker.
        separator: between two calls, before the next marker.
        repeats: there may be further calls.
    """

    markers: tuple[str, ...]
    call: str
    separator: str = ""
    repeats: bool = False


class Grammar:
    """Rules of a grammar while it is written.

    Args:
        token_id: the id of the token a text is, None if it is not one. Where tags are tokens of their own, a grammar
            must name the tokens: their texts would be looked for in ordinary tokens.
    """

    def __init__(self, token_id: Callable[[str], int | None] | None = None) -> None:
        self._rules: list[str] = []
        self._token_id = token_id

    def token(self, mark: str) -> str | None:
        """The expression for a mark that is a token; None if it is not one."""
        number = self._token_id(mark) if self._token_id is not None else None
        return None if number is None else f"<[{number}]>"

    def mark(self, mark: str) -> str:
        """The expression for a text that the tokenizer may have as a token."""
        return self.token(mark) or self.text(mark)

    def text(self, text: str) -> str:
        """The expression for ordinary text."""
        return json.dumps(text, ensure_ascii=False)

    def rule(self, body: str, options: str = "") -> str:
        """Add a rule. Returns its name."""
        name = f"rule_{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def terminal(self, body: str) -> str:
        """Add a regular rule. Returns its name."""
        name = f"TEXT_{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def json(self, schema: Mapping[str, Any]) -> str:
        """A rule for JSON of the schema. Returns its name."""
        return self.rule(f"%json {json.dumps(schema)}")

    def json_call(self, functions: Sequence[Function], arguments_key: str) -> str:
        """A rule for ``{"name": ..., "arguments": {...}}`` of one of the functions. Returns its name."""
        calls = []
        for function in functions:
            head = f'{{"name": {json.dumps(function.name, ensure_ascii=False)}, "{arguments_key}": '
            calls.append(f"{self.text(head)} {self.json(function.parameters)} {self.text('}')}")
        return self.rule(" | ".join(calls))

    def text_without(self, texts: tuple[str, ...], body: str = ANY_TEXT) -> str:
        """A regular rule for text that holds none of ``texts``. Returns its name."""
        unwanted = "|".join(map(pattern_of, texts))
        return self.terminal(rf"{body} & ~/(.|\n)*({unwanted})(.|\n)*/")

    def written(self, start: str) -> str:
        """The whole grammar."""
        return "\n".join([f"start: {start}", *self._rules, ""])


def pattern_of(text: str) -> str:
    """A regular expression, as it stands between slashes, for a text."""
    return re.escape(text).replace("/", r"\/").replace("\\\n", r"\n")
