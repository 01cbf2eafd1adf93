"""Responses that can be fetched, continued or cancelled later. They live in memory, and a bounded number of them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from nanovllm.entrypoints.serve.errors import ServeError
from nanovllm.entrypoints.serve.responses_input import Message

MAX_RESPONSES = 1024
MAX_CHARACTERS = 64 * 1024 * 1024  # of their conversations


@dataclass
class StoredResponse:
    """A response and the conversation it continues.

    Attributes:
        response: its JSON.
        messages: the conversation before it, without instructions. Later responses share its messages.
        size: characters that this response added.
        task: generates it in the background; None if it does not.
    """

    response: dict[str, Any]
    messages: list[Message]
    size: int
    task: asyncio.Task[None] | None = None


class ResponseStore:
    """The responses used last."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_characters: int = MAX_CHARACTERS) -> None:
        self._max_responses = max_responses
        self._max_characters = max_characters
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._characters = 0

    def put(self, stored: StoredResponse) -> None:
        """Keep a response; others are forgotten if they become too many, those under way last.

        Raises:
            ServeError: too many are under way in the background.
        """
        known = self._responses.pop(stored.response["id"], None)
        self._characters -= 0 if known is None else known.size
        for name in [name for name, other in self._responses.items() if other.task is None]:
            if not self._full(stored.size):
                break
            self._characters -= self._responses.pop(name).size
        if self._full(stored.size):
            raise ServeError(503, "too many responses are under way in the background", "background")
        self._responses[stored.response["id"]] = stored
        self._characters += stored.size

    def __contains__(self, response_id: str) -> bool:
        return response_id in self._responses

    def get(self, response_id: str, parameter: str = "response_id") -> StoredResponse:
        """The response ``response_id``. Raises ServeError if there is none."""
        stored = self._responses.get(response_id)
        if stored is None:
            raise ServeError(404, f"Response with id '{response_id}' not found.", parameter)
        self._responses.move_to_end(response_id)
        return stored

    def _full(self, more: int) -> bool:
        return bool(self._responses) and (
            len(self._responses) >= self._max_responses or self._characters + more > self._max_characters
        )
