"""The one answer to a chat turn, taken apart: for endpoints that have other shapes than chat completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from pydantic import ValidationError

from nanovllm.entrypoints.serve.chat import ChatTurn
from nanovllm.entrypoints.serve.errors import ServeError, validation_error
from nanovllm.entrypoints.serve.generation import Usage, final_outputs
from nanovllm.entrypoints.serve.protocol.chat import ChatCompletionRequest
from nanovllm.entrypoints.serve.reasoning import count_reasoning
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.parsers import Answer, Event, Reasoning, ToolCallArguments, ToolCallStart

# Fields of chat completions that belong to its own shape: other endpoints do not pass them on.
OWN_FIELDS = frozenset(
    {
        "add_generation_prompt",
        "best_of",
        "continue_final_message",
        "echo",
        "logprob_token_ids",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "n",
        "prompt_logprobs",
        "response_format",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "stream_options",
        "top_logprobs",
        "use_beam_search",
    }
)


def chat_request(fields: dict[str, Any], extra: dict[str, Any] | None) -> ChatCompletionRequest:
    """The chat request another endpoint's request stands for.

    Args:
        fields: what the endpoint's own fields become; None is the same as leaving a field out.
        extra: fields the endpoint does not have. Sampling parameters and vLLM's extensions are passed on.

    Raises:
        ServeError: a field of another type, or one that this endpoint cannot honour.
    """
    for name, value in (extra or {}).items():
        if name in OWN_FIELDS and value and (name, value) != ("n", 1):
            raise ServeError(400, f"{name} is not supported by this endpoint: use /v1/chat/completions", name)
    passed = {name: value for name, value in (extra or {}).items() if name not in OWN_FIELDS}
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return ChatCompletionRequest.model_validate({**passed, **given})
    except ValidationError as error:
        raise validation_error(error.errors()) from error


class AnswerReader:
    """Runs a turn and reads its answer, at once or as it grows.

    Attributes:
        usage: so far.
        finish_reason: the engine's; None until the end.
        stop_reason: the stop string that ended the answer, or None.
    """

    def __init__(self, turn: ChatTurn) -> None:
        self._turn = turn
        self._parser = turn.make_parser()
        self._limit = turn.max_calls()
        self._counts_reasoning = bool(turn.context.args.reasoning_parser)
        self._token_ids: list[int] = []
        self._reasoning: list[str] = []
        self.usage = Usage(with_details=turn.context.args.enable_prompt_tokens_details)
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None

    async def whole(self) -> Answer:
        """The answer, when it is there. The turn must not stream."""
        output = (await final_outputs([self._turn.generate()]))[0]
        completion = self._count(output)
        answer = self._parser.parse(completion.text)
        self._finish(answer.reasoning)
        return Answer(answer.reasoning, answer.content, answer.tool_calls[: self._limit])

    async def parts(self) -> AsyncGenerator[list[Event], None]:
        """Its parts as they come, for each of the engine's outputs. The turn must stream."""
        source = self._turn.generate()
        try:
            async for output in source:
                completion = self._count(output)
                events = self._parser.feed(completion.text) if completion.text else []
                if completion.finish_reason is not None:
                    events = events + self._parser.finish()
                self._reasoning += [event.text for event in events if isinstance(event, Reasoning)]
                yield [event for event in events if self._within_limit(event)]
        finally:
            await source.aclose()
        self._finish("".join(self._reasoning))

    @property
    def finished(self) -> bool:
        """Whether the model came to an end by itself."""
        return self.finish_reason in ("stop", "repetition")

    def _within_limit(self, event: Event) -> bool:
        called = isinstance(event, (ToolCallStart, ToolCallArguments))
        return not called or self._limit is None or event.index < self._limit  # type: ignore[union-attr]

    def _count(self, output: RequestOutput) -> CompletionOutput:
        if not self.usage.prompt:
            self.usage.add_prompt(output)
        completion = output.outputs[0]
        self.usage.completion += len(completion.token_ids)
        if self._counts_reasoning:
            self._token_ids += completion.token_ids
        self.finish_reason = completion.finish_reason
        self.stop_reason = completion.stop_reason
        return completion

    def _finish(self, reasoning: str | None) -> None:
        if self._counts_reasoning:
            self.usage.reasoning = count_reasoning(self._turn.context, reasoning, self._token_ids)
