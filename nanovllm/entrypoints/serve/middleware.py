"""What stands before every request: plain ASGI, so that streams pass through untouched."""

from __future__ import annotations

import contextlib
import hmac
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.entrypoints.serve import inspector
from nanovllm.entrypoints.serve.admission import GENERATING, Admission, digest
from nanovllm.entrypoints.serve.context import ServeContext
from nanovllm.entrypoints.serve.errors import ServeError, as_serve_error
from nanovllm.entrypoints.serve.memory import Memory
from nanovllm.errors import ParameterError

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
    """Lets requests pass that bring a key, as ``Authorization: Bearer`` or ``x-api-key``, and notes whose it is."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self.app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or self._is_open(scope):
            await self.app(scope, receive, send)
            return
        owner = self._owner(scope)
        if owner is not None:
            scope.setdefault("state", {})["tenant"] = owner
            await self.app(scope, receive, send)
            return
        error = ServeError(401, "Unauthorized: send an API key as 'Authorization: Bearer KEY' or 'x-api-key: KEY'")
        await error.response(scope["path"])(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        return _route_path(scope) in OPEN_PATHS

    def _owner(self, scope: Scope) -> str | None:
        """The tenant whose key the request brings; None if it brings none."""
        found = None
        for name, value in scope["headers"]:
            if name == b"authorization":
                scheme, _, value = value.partition(b" ")
                if scheme.lower() != b"bearer":
                    continue
            elif name != b"x-api-key":
                continue
            given = digest(value.strip())
            for known, owner in self._admission.owners:  # all of them: how long it takes tells nothing
                if hmac.compare_digest(given, known):
                    found = owner
        return found


class Admit:
    """Gives requests that run the model a ticket, or refuses them before their body is read."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self.app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or _route_path(scope) not in GENERATING:
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        try:
            ticket = state["ticket"] = self._admission.admit(state.get("tenant", ""), scope["headers"])
        except (ServeError, ParameterError) as error:
            await as_serve_error(error).response(scope["path"])(scope, receive, send)
            return

        async def with_quotas(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *ticket.headers()]
            await send(message)

        try:
            await self.app(scope, receive, send if ticket.account is None else with_quotas)
        finally:
            ticket.release()


class LimitBody:
    """Refuses bodies of more bytes than ``limit``, whether their length is announced or not."""

    def __init__(self, app: ASGIApp, limit: int, memory: Memory) -> None:
        self.app = app
        self._limit = limit
        self._memory = memory

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
                self._memory.dealt_with(int(length))
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
        self._memory.dealt_with(received)

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


def _route_path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
