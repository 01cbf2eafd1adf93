"""``/v1/responses``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nanovllm.entrypoints.serve.protocol.generation import INT64
from nanovllm.errors import ParameterError


class TextFormat(BaseModel):
    """The form of the answer's text."""

    model_config = ConfigDict(extra="allow")
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(BaseModel):
    """What the answer's text is to be like."""

    model_config = ConfigDict(extra="allow")
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(BaseModel):
    """How much the model is to think."""

    model_config = ConfigDict(extra="allow")
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesRequest(BaseModel):
    """A request for a response. Sampling parameters of ``/v1/chat/completions`` may be given besides these fields."""

    model_config = ConfigDict(extra="allow")
    input: str | list[dict[str, Any]] = Field(examples=["What is paged attention?"])
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(le=INT64)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    store: bool | None = True
    previous_response_id: str | None = None
    background: bool | None = False
    metadata: dict[str, Any] | None = None
    include: list[str] | None = None
    truncation: str | None = None
    top_logprobs: int | None = None
    max_tool_calls: int | None = None  # of the server's own tools: there are none
    service_tier: str | None = None
    user: str | None = None
    prompt_cache_key: str | None = None  # the prefix cache finds its prompts without one
    safety_identifier: str | None = None
    prompt: Any = None
    conversation: Any = None

    def refuse_unsupported(self) -> None:
        """Raises ParameterError for what this version cannot honour."""
        for name, remedy in (
            ("prompt", "write the prompt into input and instructions"),
            ("conversation", "use previous_response_id, or repeat the conversation in input"),
            ("top_logprobs", "use /v1/chat/completions"),
        ):
            if getattr(self, name):
                raise ParameterError(f"{name} is not supported: {remedy}", name, getattr(self, name))
        if self.truncation not in (None, "disabled"):
            raise ParameterError("input is never shortened: use 'disabled'", "truncation", self.truncation)
        for name in self.include or ():
            if name != "reasoning.encrypted_content":  # reasoning is not encrypted: it is in the output as it is
                raise ParameterError("there is nothing of this kind to include", "include", name)
        if self.text is not None and self.text.verbosity not in (None, "medium"):
            raise ParameterError(
                "the model has no such setting: ask for it in instructions", "text.verbosity", self.text.verbosity
            )
        if self.reasoning is not None and self.reasoning.summary not in (None, "auto"):
            raise ParameterError(
                "reasoning is handed out in full, without a summary", "reasoning.summary", self.reasoning.summary
            )
        if self.background and self.stream:
            raise ParameterError("a response in the background is polled, not streamed", "background", True)
        if self.background and self.store is False:
            raise ParameterError("a response in the background must be stored", "store", False)

    def response_format(self) -> dict[str, Any] | None:
        """``text.format`` in the notation of chat completions."""
        wanted = self.text.format if self.text is not None else None
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return {"type": "json_object"}
        schema = {"name": wanted.name, "schema": wanted.json_schema, "strict": wanted.strict}
        return {"type": "json_schema", "json_schema": schema}
