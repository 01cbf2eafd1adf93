"""From the text of an answer to its parts: reasoning, content and tool calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanovllm.parsers.emitter import Emitter
from nanovllm.parsers.events import Content, Event, Reasoning, ToolCallArguments, ToolCallStart
from nanovllm.parsers.formats import TOOL_PARSERS, ToolParser, lookup
from nanovllm.parsers.json_text import canonical_json
from nanovllm.parsers.reasoning import REASONING_PARSERS, ReasoningParser
from nanovllm.parsers.source import Source, Steps
from nanovllm.parsers.tools import ToolChoice, Tools


@dataclass(frozen=True)
class ToolCall:
    """One call: a function's name and the JSON text of its arguments."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Answer:
    """A whole answer; parts it does not have are None or empty."""

    reasoning: str | None = None
    content: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)


class AnswerParser:
    """Takes the text of one answer in any pieces and hands out its parts as soon as they are certain.

    The events, joined, do not depend on the pieces. Held back is only what may be the beginning of a marker, white
    space before a call, and the head of a call until its arguments begin.

    Text in a call's place that is no call is content: one that has the wrong form before its arguments begin, always.
    When something is wrong after that, what has been streamed cannot be taken back: the call stays with the arguments
    it has (a client finds them to be incomplete JSON), and the text from the wrong character on is content. With
    ``hold_calls`` a call is handed out only when it is over, so the whole text of a wrong one becomes content. A call
    that ends with the answer (the token limit) stands in both cases, with the arguments it has.

    Args:
        reasoning: how the reasoning is marked; None: the answer begins with content.
        calls: how calls are written; None: there are none, and all that follows the reasoning is content.
        tools: the functions that were offered.
        hold_calls: as above; for answers that are not streamed.
        calls_only: a grammar makes the answer consist of calls. The head of one that the token limit cut off is then
            no content.
    """

    def __init__(
        self,
        reasoning: ReasoningParser | None = None,
        calls: ToolParser | None = None,
        tools: Tools | None = None,
        hold_calls: bool = False,
        calls_only: bool = False,
    ) -> None:
        self._source = Source()
        self._emit = Emitter(hold_calls, calls is not None, calls_only)
        self._steps = self._read(reasoning, calls, tools or Tools())
        next(self._steps)  # to the point where it waits for text

    @property
    def num_calls(self) -> int:
        """Calls found so far."""
        return self._emit.num_calls

    def feed(self, delta: str) -> list[Event]:
        """The next piece of the answer's text. Returns the parts that are certain now."""
        self._source.push(delta)
        next(self._steps)
        return self._emit.take()

    def finish(self) -> list[Event]:
        """The answer is over. Returns the parts that were held back."""
        self._source.closed = True
        for _ in self._steps:
            pass
        self._emit.finish()
        return self._emit.take()

    def parse(self, text: str) -> Answer:
        """A whole answer at once; arguments are written as ``json.dumps(..., ensure_ascii=False)`` does."""
        return collect(self.feed(text) + self.finish())

    def _read(self, reasoning: ReasoningParser | None, calls: ToolParser | None, tools: Tools) -> Steps[None]:
        yield
        if reasoning is not None:
            yield from reasoning.read(self._source, self._emit)
        if calls is not None:
            yield from calls.read(self._source, self._emit, tools)
        yield from self._source.copy_until((), self._emit.content)


def collect(events: Sequence[Event]) -> Answer:
    """The whole answer that ``events`` are the parts of."""
    reasoning: list[str] = []
    content: list[str] = []
    names: list[str] = []
    arguments: list[list[str]] = []
    for event in events:
        if isinstance(event, Reasoning):
            reasoning.append(event.text)
        elif isinstance(event, Content):
            content.append(event.text)
        elif isinstance(event, ToolCallStart):
            names.append(event.name)
            arguments.append([])
        elif isinstance(event, ToolCallArguments):
            arguments[event.index].append(event.fragment)
    calls = [ToolCall(name, canonical_json("".join(pieces))) for name, pieces in zip(names, arguments, strict=True)]
    return Answer("".join(reasoning) or None, "".join(content) or None, calls)


def make_answer_parser(
    *,
    reasoning_parser: str | None = None,
    tool_parser: str | None = None,
    tools: Sequence[Any] | None = None,
    tool_choice: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    prompt: str | None = None,
    continue_final_message: bool = False,
    hold_calls: bool = False,
) -> AnswerParser:
    """The parser for one answer to a request.

    Args:
        reasoning_parser: a name in `REASONING_PARSERS`; None or "": the model does not reason.
        tool_parser: a name in `TOOL_PARSERS`; None or "": calls are not looked for.
        tools: the request's tools.
        tool_choice: the request's choice among them; with "none" calls are not looked for, and with "required" or a
            named function the answer must have been held to `tool_constraint`.
        chat_template_kwargs: what the prompt was rendered with; the reasoning switch is read from it.
        prompt: the prompt's text, if known; it may have closed the reasoning.
        continue_final_message: the prompt ends within a message, which the answer continues.
        hold_calls: hand calls out whole (see `AnswerParser`).

    Raises:
        ParameterError: an unknown parser, a malformed tool or choice.
    """
    reasoning = lookup(REASONING_PARSERS, reasoning_parser, "reasoning_parser") if reasoning_parser else None
    calls = lookup(TOOL_PARSERS, tool_parser, "tool_call_parser") if tool_parser else None
    functions = Tools.read(tools)
    mode = ToolChoice.read(tool_choice, functions).mode
    if mode == "none":
        calls = None
    if reasoning is not None and not reasoning.expected(prompt, chat_template_kwargs, continue_final_message):
        reasoning = None
    calls_only = calls is not None and mode in ("required", "named")
    return AnswerParser(reasoning, calls, functions, hold_calls, calls_only)
