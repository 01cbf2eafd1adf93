"""The forms of tool calls this version knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from nanovllm.errors import ParameterError
from nanovllm.parsers import hermes, llama3_json, mistral, qwen3_coder
from nanovllm.parsers.emitter import Emitter
from nanovllm.parsers.grammar import Envelope, Grammar
from nanovllm.parsers.source import Source, Steps
from nanovllm.parsers.tools import Function, Tools

Parser = TypeVar("Parser")


@dataclass(frozen=True)
class ToolParser:
    """One form of tool calls.

    Attributes:
        read: reads an answer, from after its reasoning to its end.
        envelope: what a call of the functions looks like, for `tool_constraint`; the flag is whether an answer may
            hold several.
    """

    read: Callable[[Source, Emitter, Tools], Steps[None]]
    envelope: Callable[[Grammar, Sequence[Function], bool], Envelope]


TOOL_PARSERS = {
    "hermes": ToolParser(hermes.read, hermes.envelope),
    "llama3_json": ToolParser(llama3_json.read, llama3_json.envelope),
    "mistral": ToolParser(mistral.read, mistral.envelope),
    "qwen3_coder": ToolParser(qwen3_coder.read, qwen3_coder.envelope),
    "qwen3_xml": ToolParser(qwen3_coder.read, qwen3_coder.envelope),
}


def lookup(parsers: Mapping[str, Parser], name: str, parameter: str) -> Parser:
    """The parser called ``name``. Raises ParameterError if there is none."""
    if name not in parsers:
        raise ParameterError(f"unknown parser: use one of {', '.join(sorted(parsers))}", parameter, name)
    return parsers[name]
