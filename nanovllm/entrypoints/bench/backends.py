"""How a benchmark talks to a server: what it sends, and what it notes of the answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nanovllm.entrypoints.bench.datasets import SampleRequest


@dataclass(slots=True)
class RequestResult:
    """One request and its answer.

    Attributes:
        success: there is a complete answer.
        error: why not.
        start_time: when it was sent, in seconds of `time.perf_counter`.
        queue_time: seconds it waited for one of ``max_concurrency`` places before.
        latency: seconds from sending to the last piece of the answer.
        ttft: to the first piece.
        itls: between pieces.
        prompt_len: tokens of the prompt.
        output_len: tokens of the answer, as the server counts them; None if it does not say.
        text: the answer.
    """

    success: bool = False
    error: str = ""
    start_time: float = 0.0
    queue_time: float = 0.0
    latency: float = 0.0
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)
    prompt_len: int = 0
    output_len: int | None = None
    text: str = ""


Payload = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Backend:
    """A kind of endpoint.

    Attributes:
        endpoint: its path.
        payload: (request, model) -> what is posted.
        piece: a choice of a streamed answer -> its text; None where nothing was generated yet. None: the endpoint does
            not stream.
    """

    endpoint: str
    payload: Callable[[SampleRequest, str], Payload]
    piece: Callable[[Payload], str | None] | None


def _completion_payload(request: SampleRequest, model: str) -> Payload:
    return {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.expected_output_len,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _chat_payload(request: SampleRequest, model: str) -> Payload:
    return {
        "model": model,
        "messages": [{"role": "user", "content": request.prompt}],
        "max_completion_tokens": request.expected_output_len,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _embeddings_payload(request: SampleRequest, model: str) -> Payload:
    return {"model": model, "input": request.prompt}


def _completion_piece(choice: Payload) -> str | None:
    return choice.get("text") or ""


def _chat_piece(choice: Payload) -> str | None:
    delta = choice.get("delta") or {}
    text = delta.get("reasoning") or delta.get("reasoning_content") or delta.get("content") or ""
    if not text and "role" in delta and choice.get("finish_reason") is None and not delta.get("tool_calls"):
        return None  # the role comes before anything is generated
    return text


_COMPLETIONS = Backend("/v1/completions", _completion_payload, _completion_piece)
BACKENDS = {
    "openai": _COMPLETIONS,
    "vllm": _COMPLETIONS,
    "openai-chat": Backend("/v1/chat/completions", _chat_payload, _chat_piece),
    "openai-embeddings": Backend("/v1/embeddings", _embeddings_payload, None),
}


class AnswerNotes:
    """Notes the pieces of one streamed answer as they arrive."""

    def __init__(self, backend: Backend, result: RequestResult) -> None:
        self._piece = backend.piece
        self._result = result
        self._last = result.start_time
        self._texts: list[str] = []

    def take(self, data: bytes, now: float) -> None:
        """One event, and when it arrived.

        Raises:
            ValueError: the event is an error, or no JSON.
        """
        if data == b"[DONE]":
            return
        event: Payload = json.loads(data)
        result = self._result
        if "error" in event:
            raise ValueError(error_text(data))
        if (usage := event.get("usage")) is not None:
            note_usage(result, usage)
        if not event.get("choices") or self._piece is None:
            return
        text = self._piece(event["choices"][0])
        if text is None:
            return
        if self._last == result.start_time:
            result.ttft = now - result.start_time
        else:
            result.itls.append(now - self._last)
        self._last = now
        self._texts.append(text)

    def finish(self) -> None:
        """The stream has ended.

        Raises:
            ValueError: nothing was in it.
        """
        if not self._texts:
            raise ValueError("the stream ended without a piece of an answer")
        self._result.latency = self._last - self._result.start_time
        self._result.text = "".join(self._texts)


def note_usage(result: RequestResult, usage: Payload) -> None:
    """Token counts as the server has them."""
    result.output_len = usage.get("completion_tokens", result.output_len)
    result.prompt_len = usage.get("prompt_tokens", result.prompt_len)


def error_text(body: bytes) -> str:
    """What a server says went wrong, in one line."""
    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        text = body.decode("utf-8", errors="replace")
    return " ".join(str(text).split())[:500]
