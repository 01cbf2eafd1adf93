"""Server-sent events with little work per event, and clients that go away.

A stream's constant parts are made bytes once; per event only what is new is encoded (`json_text`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from json.encoder import encode_basestring, encode_basestring_ascii  # type: ignore[attr-defined]
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanovllm.entrypoints.serve.errors import as_serve_error

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it is for the access log


def json_text(text: str) -> str:
    """A string as JSON, in which no client's line reader sees the end of a line."""
    if text.isascii():
        return encode_basestring_ascii(text)
    return encode_basestring(text).replace("\x85", "\\u0085").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def json_bytes(value: Any) -> bytes:
    """A value as compact JSON."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if not text.isascii():
        text = text.replace("\x85", "\\u0085").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return text.encode()


def event(value: Any) -> bytes:
    """One event that carries a JSON value."""
    return b"data: " + json_bytes(value) + b"\n\n"


class EventStream(Response):
    """Sends events as they come, and leaves their source as soon as the client has gone.

    The head of the answer goes out with the first event, so that what goes wrong before it has an HTTP status of its
    own. What goes wrong later ends the stream with an event that tells, in the shape the path's clients read.

    Args:
        events: encoded events; it is closed however the stream ends.
        path: of the request.
        keep_alive: seconds of silence after which a comment is sent; 0: never.
        ending: what follows the event of an error.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], path: str, keep_alive: float = 0.0, ending: bytes = DONE) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._path = path
        self._keep_alive = keep_alive
        self._ending = ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await leave_on_disconnect(receive, self._run(scope, receive, send))

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        source = self._events
        events = source if not self._keep_alive else _with_keep_alive(source, self._keep_alive)
        started = False
        try:
            async for data in events:
                if not started:
                    started = True
                    await self._send_head(send)
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as fault:
            error = as_serve_error(fault)
            if not started:
                await error.response(self._path)(scope, receive, send)
                return
            name = b"event: error\n" if self._path.startswith("/v1/messages") else b""
            data = name + event(error.body(self._path)) + self._ending
            await send({"type": "http.response.body", "body": data, "more_body": True})
        finally:
            for each in (events, source):  # in this order: the first may be waiting for the second
                if isinstance(each, AsyncGenerator):
                    await each.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_head(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})


async def answer_unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The result of ``work``, which is cancelled as soon as the client has gone."""
    result = await leave_on_disconnect(request.receive, work)
    return Response(status_code=CLIENT_CLOSED_REQUEST) if result is None else result


async def leave_on_disconnect(
    receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, Result]
) -> Result | None:
    """Await ``work``; cancel it and return None when ``receive`` tells that the client has gone."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def _wait_for_disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _with_keep_alive(source: AsyncIterator[bytes], seconds: float) -> AsyncIterator[bytes]:
    """The events of ``source``, and a comment whenever it has been silent for so long."""
    pending: asyncio.Future[bytes] | None = None
    try:
        while True:
            if pending is None:
                pending = asyncio.ensure_future(source.__anext__())  # type: ignore[arg-type]
            done, _ = await asyncio.wait((pending,), timeout=seconds)
            if not done:
                yield KEEP_ALIVE
                continue
            try:
                data = pending.result()
            except StopAsyncIteration:
                return
            finally:
                pending = None
            yield data
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.wait((pending,))
