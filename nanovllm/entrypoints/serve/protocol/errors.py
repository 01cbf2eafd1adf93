"""What an error looks like, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class ErrorInfo(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: int


class ErrorResponse(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorInfo


_MEANINGS = {
    400: "the request cannot be honoured",
    401: "the API key is missing or wrong",
    404: "there is no such model",
    413: "the body is too large",
    429: "a quota is used up; see Retry-After",
    500: "the engine met a fault with this request",
    503: "the server is full, or ending, or the engine has stopped",
    504: "the request did not end in the time it had",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text} for status, text in _MEANINGS.items()
}
