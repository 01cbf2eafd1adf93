"""``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from nanovllm.entrypoints.serve.protocol.chat import ChatMessage, Tool


class TokenizeRequest(BaseModel):
    """A prompt, or a conversation, whose tokens are asked for."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    prompt: str | None = Field(default=None, examples=["Hello, world"])
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = Field(default=None, description="default: for a prompt, not for a conversation")
    return_token_strs: bool | None = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class TokenizeResponse(BaseModel):
    """Tokens, and how many of them there are."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(BaseModel):
    """Tokens whose text is asked for."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    tokens: list[int] = Field(examples=[[1, 2, 3]])


class DetokenizeResponse(BaseModel):
    """The text."""

    prompt: str
