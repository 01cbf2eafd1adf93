"""``/v1/chat/completions``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nanovllm.entrypoints.serve.protocol.generation import GenerationRequest
from nanovllm.errors import ParameterError
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams

REMOVED = {"functions": "use tools", "function_call": "use tool_choice"}


class ContentPart(BaseModel):
    """A piece of a message; this version reads text."""

    model_config = ConfigDict(extra="allow")
    type: str = "text"
    text: str | None = None


class ChatMessage(BaseModel):
    """One turn of a conversation. Further fields go to the chat template."""

    model_config = ConfigDict(extra="allow")
    role: str = Field(examples=["user"])
    content: str | list[ContentPart | str] | None = Field(default=None, examples=["What is paged attention?"])
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The message as templates read it; its reasoning under both names."""
        message = self.model_dump(exclude_none=True)
        thought = self.reasoning or self.reasoning_content
        if thought:
            message["reasoning"] = message["reasoning_content"] = thought
        return message


class Tool(BaseModel):
    """A function the model may call."""

    model_config = ConfigDict(extra="allow")
    type: Literal["function"] = "function"
    function: dict[str, Any] = Field(examples=[{"name": "get_weather", "parameters": {"type": "object"}}])


class ChatCompletionRequest(GenerationRequest):
    """A request to continue a conversation."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = Field(default=None, examples=["auto"])
    parallel_tool_calls: bool | None = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool = True
    # vLLM's own
    echo: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def refuse_unsupported(self) -> None:
        """Raises ParameterError for a field this version cannot honour."""
        super().refuse_unsupported()
        for name, remedy in REMOVED.items():
            if (self.model_extra or {}).get(name):
                raise ParameterError(f"{name} is no longer supported: {remedy}", name, "...")
        if self.top_logprobs is not None and self.top_logprobs != 0 and not self.logprobs:
            raise ParameterError(
                "when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs", self.top_logprobs
            )

    def params(
        self, defaults: dict[str, Any], constraint: StructuredOutputsParams | None = None, **others: Any
    ) -> SamplingParams:
        """How to sample.

        Args:
            defaults: the model's (generation_config.json).
            constraint: what tools ask of the output's form; it goes before the request's own.

        Raises:
            ParameterError: a value out of range.
        """
        self.refuse_unsupported()
        asked = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        params = self.sampling_params(
            defaults,
            max_tokens=defaults.get("max_tokens") if asked is None else asked,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
            **others,
        )
        if constraint is not None:
            params.structured_outputs = constraint
        return params
