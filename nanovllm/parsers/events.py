"""What an answer consists of, in the order the model writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text the model thinks aloud."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """Text meant for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """The model calls the function ``name``; ``index`` counts the calls of one answer from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of the JSON text of a call's arguments: the pieces of one ``index``, joined, are a JSON object."""

    index: int
    fragment: str


Event: TypeAlias = Reasoning | Content | ToolCallStart | ToolCallArguments
