"""``/v1/messages``: Anthropic's shape of a conversation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nanovllm.entrypoints.serve.protocol.generation import INT64
from nanovllm.errors import ParameterError

Blocks = str | list[dict[str, Any]]


class AnthropicMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="allow")
    role: Literal["user", "assistant", "system"]
    content: Blocks = Field(examples=["What is paged attention?"])


class AnthropicTool(BaseModel):
    """A function the model may call."""

    model_config = ConfigDict(extra="allow")
    type: str | None = None
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class AnthropicToolChoice(BaseModel):
    """How tools are to be called."""

    model_config = ConfigDict(extra="allow")
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(BaseModel):
    """Whether the model is to think, and for how many tokens at most."""

    model_config = ConfigDict(extra="allow")
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None


class OutputConfig(BaseModel):
    """The form of the answer."""

    model_config = ConfigDict(extra="allow")
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class CountTokensRequest(BaseModel):
    """A conversation whose tokens are to be counted."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    messages: list[AnthropicMessage] = Field(min_length=1)
    system: Blocks | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountTokensRequest):
    """A request for the next message. Sampling parameters of ``/v1/chat/completions`` may be given besides."""

    max_tokens: Annotated[int, Field(ge=1, le=INT64)]
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    stream: bool | None = False
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    container: Any = None
    mcp_servers: Any = None

    def refuse_unsupported(self) -> None:
        """Raises ParameterError for what this version cannot honour."""
        for name in ("container", "mcp_servers"):
            if getattr(self, name):
                raise ParameterError("the server runs no tools itself", name, getattr(self, name))
