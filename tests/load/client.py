"""One HTTP request over a raw socket, and what came back. Thousands of them fit into one process."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import dataclass, field
from typing import Any

LIMIT = 120.0  # seconds that any request may take


@dataclass
class Answer:
    """What came back.

    Attributes:
        status: of HTTP; 0: the connection ended without one.
        body: as far as it came, chunks joined.
        ended: whether it came to its end.
        reset: whether the server ended the connection otherwise than by closing it, or did not accept it.
        start, first, last: seconds of the monotonic clock: sent, first byte, last byte; 0.0: never.
    """

    status: int = 0
    body: bytes = b""
    ended: bool = False
    reset: bool = False
    start: float = 0.0
    first: float = 0.0
    last: float = 0.0
    times: list[float] = field(default_factory=list)

    @property
    def events(self) -> list[Any]:
        """The data of a stream's events, without the last, which says that it is done."""
        lines = [line[6:] for line in self.body.split(b"\n") if line.startswith(b"data: ")]
        return [json.loads(line) for line in lines if line != b"[DONE]"]

    @property
    def done(self) -> bool:
        """Whether a stream has said that it is."""
        return self.body.endswith(b"data: [DONE]\n\n")

    @property
    def tokens(self) -> list[int]:
        """Token ids of a streamed completion of one output that asked for them."""
        return [token for event in self.events for choice in event.get("choices", ()) for token in choice["token_ids"]]

    @property
    def error(self) -> str | None:
        """The message of an error that a stream has ended with."""
        return next((str(event["error"]["message"]) for event in self.events if "error" in event), None)


class Client(asyncio.Protocol):
    """Sends one request and collects the answer.

    Args:
        request: its bytes.
        pause: seconds between two reads; 0.0 reads at once.
        leave_after: bytes after which the client goes away without a word; None stays to the end.
        timed: note when each piece arrived.
    """

    def __init__(self, request: bytes, pause: float, leave_after: int | None, timed: bool) -> None:
        self.answer = Answer()
        self.gone = asyncio.get_running_loop().create_future()
        self._request = request
        self._pause = pause
        self._leave_after = leave_after
        self._timed = timed
        self._data = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.answer.start = time.monotonic()
        transport.write(self._request)
        if self._leave_after == 0:
            asyncio.get_running_loop().call_later(0.05, transport.abort)

    def data_received(self, data: bytes) -> None:
        answer, now = self.answer, time.monotonic()
        answer.first = answer.first or now
        answer.last = now
        if self._timed:
            answer.times.append(now)
        self._data += data
        if self._leave_after is not None and len(self._data) > self._leave_after:
            self.transport.abort()
        elif self._pause:
            self.transport.pause_reading()
            asyncio.get_running_loop().call_later(self._pause, self._resume)

    def _resume(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self.answer.reset = error is not None
        if not self.gone.done():
            self.gone.set_result(None)

    def result(self) -> Answer:
        """What has come, taken apart."""
        answer = self.answer
        head, found, body = bytes(self._data).partition(b"\r\n\r\n")
        if found:
            answer.status = int(head[9:12])
            if b"chunked" in head.lower():
                answer.body, answer.ended = _unchunked(body)
            else:
                answer.body = body
                length = next(
                    (line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b":"
                )
                answer.ended = len(body) == int(length.split(b":")[1] or -1)
        return answer


async def send(
    port: int,
    request: bytes,
    *,
    pause: float = 0.0,
    leave_after: int | None = None,
    timed: bool = False,
    limit: float = LIMIT,
) -> Answer:
    """Send bytes, read until the server closes, and take the answer apart. See `Client` for the arguments."""
    loop = asyncio.get_running_loop()
    connection = socket.socket()
    connection.setblocking(False)
    if pause:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    try:
        await asyncio.wait_for(loop.sock_connect(connection, ("127.0.0.1", port)), limit)
        _, client = await loop.create_connection(lambda: Client(request, pause, leave_after, timed), sock=connection)
    except (OSError, asyncio.TimeoutError):
        connection.close()
        return Answer(reset=True)
    try:
        await asyncio.wait_for(asyncio.shield(client.gone), limit)
    except asyncio.TimeoutError:
        client.transport.abort()
        raise AssertionError(f"no end of an answer after {limit:g} s: {bytes(client._data[-300:])!r}") from None
    return client.result()


def post(path: str, body: Any, *headers: str) -> bytes:
    """The bytes of a request whose connection ends with its answer. ``body``: JSON, or bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    lines.append("Content-Type: application/json")
    if not any(header.lower().startswith(("content-length", "transfer-encoding")) for header in headers):
        lines.append(f"Content-Length: {len(data)}")
    return "\r\n".join([*lines, "", ""]).encode() + data


def get(path: str) -> bytes:
    """The bytes of a request whose connection ends with its answer."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()


def _unchunked(data: bytes) -> tuple[bytes, bool]:
    """The content of a chunked body, and whether it came to its end."""
    parts, start = [], 0
    while (end := data.find(b"\r\n", start)) >= 0:
        size = int(data[start:end], 16)
        if size == 0:
            return b"".join(parts), True
        parts.append(data[end + 2 : end + 2 + size])
        start = end + 2 + size + 2
    return b"".join(parts), False
