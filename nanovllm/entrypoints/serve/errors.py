"""From exceptions to the JSON that clients read: OpenAI's shape, and Anthropic's under ``/v1/messages``."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nanovllm.errors import EngineDeadError, EngineGenerateError, ParameterError, RequestTimeoutError, StepError

logger = logging.getLogger(__name__)

NAMES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
    504: "RequestTimeoutError",
}
ANTHROPIC_NAMES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
MAX_ECHO = 400  # characters of a client's own input that an error repeats


class ServeError(Exception):
    """An answer with an error status.

    Args:
        status: HTTP status.
        message: for the client.
        param: name of the offending field.
        kind: the error's ``type``; by default the name that belongs to the status.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        kind: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.kind = kind or NAMES.get(status, "InternalServerError")
        self.headers = headers or ({"WWW-Authenticate": "Bearer"} if status == 401 else {})

    def body(self, path: str = "") -> dict[str, Any]:
        """The JSON object of the answer to a request of ``path``."""
        if path.startswith("/v1/messages"):
            kind = ANTHROPIC_NAMES.get(self.status, "api_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        return {"error": error}

    def response(self, path: str = "") -> Response:
        """The HTTP answer."""
        # Escaped, because a client's own text comes back in it, which need not be Unicode.
        return Response(json.dumps(self.body(path)), self.status, self.headers, "application/json")


def as_serve_error(error: BaseException) -> ServeError:
    """What a client is told of an exception. Faults that are not the client's are logged."""
    if isinstance(error, ServeError):
        return error
    if isinstance(error, ParameterError):
        return ServeError(400, _shortened(str(error)), error.parameter)
    if isinstance(error, UnicodeEncodeError):
        return ServeError(400, f"the request holds text that is not Unicode: {error.reason} (position {error.start})")
    if isinstance(error, EngineDeadError):
        return ServeError(503, str(error))
    if isinstance(error, RequestTimeoutError):
        return ServeError(504, str(error))
    if isinstance(error, (EngineGenerateError, StepError)):
        return ServeError(500, str(error))
    logger.error("A request failed.", exc_info=error)
    return ServeError(500, f"{type(error).__name__}: {error}"[:MAX_ECHO])


def add_handlers(app: FastAPI) -> None:
    """Answer every exception of a handler in the client's shape."""

    async def answer(request: Request, error: Exception) -> Response:
        return as_serve_error(error).response(request.url.path)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, (RequestValidationError, ValidationError))
        return validation_error(error.errors()).response(request.url.path)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        found = ServeError(error.status_code, str(error.detail))
        body = {**found.body(request.url.path), "detail": error.detail}
        return Response(json.dumps(body), error.status_code, error.headers, "application/json")

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(ValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)
    kinds = (ServeError, ParameterError, UnicodeEncodeError, EngineDeadError, EngineGenerateError, StepError,
             RequestTimeoutError)  # fmt: skip
    for kind in kinds:
        app.add_exception_handler(kind, answer)


def validation_error(errors: Sequence[Any]) -> ServeError:
    """A body that does not fit its model: every place where it does not, and the first one's name."""
    lines = []
    for error in errors:
        shown = {key: error[key] for key in ("type", "loc", "msg", "input") if key in error}
        lines.append(f"  {_shortened(str(shown))}")
    count = f"{len(lines)} validation error{'s' if len(lines) != 1 else ''}:"
    place = ".".join(str(part) for part in errors[0]["loc"]) if errors else None
    return ServeError(400, "\n".join([count, *lines[:10]]), place, "Bad Request")


def _shortened(text: str) -> str:
    return text if len(text) <= 2 * MAX_ECHO else f"{text[:MAX_ECHO]} … {text[-MAX_ECHO:]}"
