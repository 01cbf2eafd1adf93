"""An HTTP/1.1 client that spends as little as possible on each piece of a streamed answer.

A benchmark's client runs on the cores of the server it measures. At some 15 us per piece (35 us of aiohttp, 100 us of
httpx on the same machine) thousands of tokens per second leave those cores to the server, and a piece's time is taken
where it arrives, not when a task gets its turn. Connections are kept and used again. Proxies are not used.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

EventHandler = Callable[[bytes, float], None]


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """An answer, complete.

    Attributes:
        status: such as 200.
        body: empty where an event handler took it.
        finished: `time.perf_counter` of its last byte, in seconds.
    """

    status: int
    body: bytes
    finished: float


class HttpClient:
    """Requests to one server.

    Args:
        base_url: ``http://host:port``, and a path that all requests begin with, if any.
        headers: of every request.
        verify: whether the certificate of an https server is checked.

    Raises:
        ValueError: not an http(s) URL.
    """

    def __init__(self, base_url: str, headers: Mapping[str, str] | None = None, verify: bool = True) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{base_url!r} is not a URL such as http://localhost:8000")
        self._host, self._path = parts.hostname, parts.path.rstrip("/")
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._ssl: ssl.SSLContext | None = None
        if parts.scheme == "https":
            self._ssl = ssl.create_default_context() if verify else ssl._create_unverified_context()
        lines = {"Host": parts.netloc.rpartition("@")[2], "Content-Type": "application/json", **(headers or {})}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._idle: list[_Connection] = []

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        on_event: EventHandler | None = None,
    ) -> HttpAnswer:
        """Send a request and wait for the end of its answer.

        Args:
            on_event: called with the data of every server-sent event and the time it arrived; answers other than 200
                are not handed to it.

        Raises:
            OSError: no connection, or it was lost.
        """
        more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._head}{more}Content-Length: {len(body)}\r\n\r\n"
        message = head.encode("latin-1") + body
        while True:
            used = bool(self._idle)
            connection = self._idle.pop() if used else await self._connect()
            try:
                answer = await connection.exchange(message, on_event)
            except _NotAnswered:
                if not used:
                    raise
                continue  # the server had closed a connection that was idle: another one
            except BaseException:
                connection.close()
                raise
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.close()
            return answer

    def close(self) -> None:
        """Close the connections that are kept."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._ssl)
        return connection


class _NotAnswered(ConnectionError):
    """The connection ended before the first byte of an answer."""


class _Connection(asyncio.Protocol):
    """One connection, and the answer that is arriving on it."""

    def __init__(self) -> None:
        self.reusable = False
        self._buffer = bytearray()
        self._closed = False
        self._now = 0.0
        self._reading: Generator[None, None, HttpAnswer] | None = None

    async def exchange(self, message: bytes, on_event: EventHandler | None) -> HttpAnswer:
        if self._closed:
            raise _NotAnswered("the server closed the connection")
        self._answer: asyncio.Future[HttpAnswer] = asyncio.get_running_loop().create_future()
        self._reading = self._read_answer(on_event)
        next(self._reading)
        self._transport.write(message)
        return await self._answer

    def close(self) -> None:
        self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        self._buffer += data
        self._go_on()

    def connection_lost(self, error: Exception | None) -> None:
        self._closed = True
        self._go_on()
        if self._reading is not None and not self._answer.done():
            kind = ConnectionError if self._now else _NotAnswered
            self._answer.set_exception(kind(f"the connection was lost before the end of the answer ({error or 'EOF'})"))

    # Reading: a generator that rests whenever it needs more bytes.

    def _go_on(self) -> None:
        if self._reading is None:
            return
        try:
            next(self._reading)
        except StopIteration as end:
            self._finish(result=end.value)
        except (ValueError, KeyError) as error:  # of the parser, or of the event handler
            self.reusable = False
            self._finish(error=error)

    def _finish(self, result: HttpAnswer | None = None, error: Exception | None = None) -> None:
        self._reading, self._now = None, 0.0
        if self._answer.done():  # cancelled
            return
        if result is not None:
            self._answer.set_result(result)
        elif error is not None:
            self._answer.set_exception(error)

    def _read_answer(self, on_event: EventHandler | None) -> Generator[None, None, HttpAnswer]:
        status, headers = 100, {}
        while status < 200:  # 100 Continue and its like precede the answer
            head = (yield from self._until(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.split("\r\n")
            status = int(first.split(" ")[1])
            headers = {
                name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
            }
        self.reusable = headers.get("connection", "").lower() != "close"
        body: list[bytes] = []
        take: Callable[[bytes], None] = body.append
        if on_event is not None and status == 200:
            take = _EventLines(self, on_event).take
        if "chunked" in headers.get("transfer-encoding", "").lower():
            while size := int((yield from self._until(b"\r\n")).split(b";")[0], 16):
                take((yield from self._exactly(size + 2))[:-2])
            while (yield from self._until(b"\r\n")):
                pass  # trailers
        elif "content-length" in headers:
            take((yield from self._exactly(int(headers["content-length"]))))
        elif status not in (204, 304):
            self.reusable = False
            while not self._closed:
                take((yield from self._exactly(len(self._buffer))))
                yield
        return HttpAnswer(status, b"".join(body), self._now)

    @property
    def now(self) -> float:
        """When the bytes arrived that are being read."""
        return self._now

    def _until(self, end: bytes) -> Generator[None, None, bytes]:
        while (position := self._buffer.find(end)) < 0:
            yield
        return self._cut(position, len(end))

    def _exactly(self, count: int) -> Generator[None, None, bytes]:
        while len(self._buffer) < count:
            yield
        return self._cut(count, 0)

    def _cut(self, count: int, skip: int) -> bytes:
        data = bytes(self._buffer[:count])
        del self._buffer[: count + skip]
        return data


class _EventLines:
    """Server-sent events in a body that arrives in pieces. Each is one ``data:`` line, as from OpenAI's servers."""

    def __init__(self, connection: _Connection, on_event: EventHandler) -> None:
        self._connection = connection
        self._on_event = on_event
        self._rest = b""

    def take(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._on_event(line[5:].strip(), self._connection.now)
