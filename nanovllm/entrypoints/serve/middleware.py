"""What stands before every request: plain ASGI, so that streams pass through untouched."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import uuid
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.entrypoints.serve import inspector
from nanovllm.entrypoints.serve.context import ServeContext
from nanovllm.entrypoints.serve.errors import ServeError, as_serve_error

# Open without a key: they neither run the model nor tell of its users.
OPEN_PATHS = inspector.OPEN_PATHS | {
    "/health", "/ping", "/version", "/metrics", "/load", "/docs", "/redoc", "/openapi.json"
}  # fmt: skip


class CatchFaults:
    """Answers what no handler caught, and logs it once."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except Exception as fault:
            error = as_serve_error(fault)
            with contextlib.suppress(RuntimeError):  # an answer had begun; the connection is closed
                await error.response(scope["path"])(scope, receive, send)


class RequireKey:
    """Lets requests pass that bring one of the keys, as ``Authorization: Bearer`` or ``x-api-key``."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or self._is_open(scope) or self._has_key(scope):
            await self.app(scope, receive, send)
            return
        error = ServeError(401, "Unauthorized: send an API key as 'Authorization: Bearer KEY' or 'x-api-key: KEY'")
        await error.response(scope["path"])(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        return scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_PATHS

    def _has_key(self, scope: Scope) -> bool:
        found = False
        for name, value in scope["headers"]:
            if name == b"authorization":
                scheme, _, value = value.partition(b" ")
                if scheme.lower() != b"bearer":
                    continue
            elif name != b"x-api-key":
                continue
            digest = _digest(value.strip())
            for known in self._digests:  # all of them: how long it takes tells nothing
                found |= hmac.compare_digest(digest, known)
        return found


class LimitBody:
    """Refuses bodies of more bytes than ``limit``, whether their length is announced or not."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = next((value for name, value in scope["headers"] if name == b"content-length"), None)
        if length is not None:
            if int(length) > self._limit:
                await self._error().response(scope["path"])(scope, receive, send)
            else:
                await self.app(scope, receive, send)
            return
        received, refused = 0, False

        async def counted() -> Message:
            nonlocal received, refused
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                if not refused:
                    refused = True
                    await self._error().response(scope["path"])(scope, receive, send)
                return {"type": "http.disconnect"}
            return message

        async def unless_refused(message: Message) -> None:
            if not refused:
                await send(message)

        await self.app(scope, counted, unless_refused)

    def _error(self) -> ServeError:
        return ServeError(413, f"the body is larger than {self._limit} bytes (--max-request-body-size)")


class RequestIds:
    """Answers with the ``X-Request-Id`` of the request, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
        request_id = given or uuid.uuid4().hex.encode()
        if given is None:
            scope["headers"] = [*scope["headers"], (b"x-request-id", request_id)]

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        await self.app(scope, receive, named)


class CountLoad:
    """Counts requests under way that run the model."""

    def __init__(self, app: ASGIApp, context: ServeContext) -> None:
        self.app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or "/v1/" not in scope["path"]:
            await self.app(scope, receive, send)
            return
        self._context.load += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._context.load -= 1


def _digest(key: str | bytes) -> bytes:
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()
