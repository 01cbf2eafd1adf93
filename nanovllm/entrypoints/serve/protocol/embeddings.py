"""``/v1/embeddings``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nanovllm.entrypoints.serve.protocol.chat import ChatMessage

Ids = Annotated[list[int], Field(min_length=1)]


class EmbeddingRequest(BaseModel):
    """Texts, tokens or a conversation whose vectors are asked for."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    input: str | Ids | list[str] | list[Ids] | None = Field(default=None, examples=["Hello, world"])
    messages: list[ChatMessage] | None = Field(default=None, description="a conversation, instead of input")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None
    use_activation: bool | None = Field(default=None, description="scale vectors to length 1; default: as the model")
    normalize: bool | None = Field(default=None, description="the same, under its old name")
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = Field(default=None, description="default: for input, not for a conversation")
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    priority: int = 0
    request_id: str | None = None


class Embedding(BaseModel):
    """One vector."""

    index: int
    object: Literal["embedding"] = "embedding"
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: dict[str, int] | None = None


class EmbeddingResponse(BaseModel):
    """Vectors in the order of their texts."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage
