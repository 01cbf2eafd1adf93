"""Connections: how many there may be, and which are left because their client does nothing.

    accept --> Connection --> there is room: HTTP       else 503, closed
                                 |
    once a second, Connections.look: has the client sent its request, does it take its answer?   else it is left

A client that reads slowly costs a buffer of 64 KiB at most and the answer it has asked for: `OutputProcessor` keeps
what it has not taken yet as one output, and nobody waits for it. One that takes nothing at all, or does not finish its
request, is left after ``client_timeout`` seconds; a request of its that runs is aborted.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

if TYPE_CHECKING:
    from nanovllm.engine.stats import EngineStats

logger = logging.getLogger(__name__)

OTHER_FILES = 128  # that this process may have open besides connections: libraries, files of the model, sockets
FEW = 1024  # connections; a machine that allows fewer is told of at the start
ACCEPTED_AT_ONCE = 128  # connections taken between two looks at their number; less than other files leave
QUIET = 10.0  # seconds between lines that say the same
_BODY = (
    b'{"error":{"message":"The server has no room for another connection.","type":"ServiceUnavailableError",'
    b'"param":null,"code":503}}'
)
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(_BODY), _BODY)
)


class Connections:
    """The connections of a server.

    Args:
        stats: where faults are counted.
        client_timeout: seconds that a client may leave the server waiting; 0: for ever.
        file_limit: files this process may have open; None: any number.
    """

    def __init__(self, stats: EngineStats, client_timeout: float, file_limit: int | None) -> None:
        self.most = None if file_limit is None else max(1, file_limit - OTHER_FILES - ACCEPTED_AT_ONCE)
        self._stats = stats
        self._timeout = client_timeout
        self._waiting: dict[Any, tuple[object, float]] = {}  # connection -> what it stands at, and since when
        self._told = -QUIET
        if self.most is not None and self.most < FEW:
            logger.warning(
                "This process may have %d files open, so there is room for %d connections; others get a 503. More of "
                "them need a higher limit (ulimit -n, or LimitNOFILE of a systemd unit).", file_limit, self.most
            )  # fmt: skip

    def protocol(self) -> type[asyncio.Protocol]:
        """The class of a connection, for uvicorn."""
        owner, base = self, AutoHTTPProtocol

        class Connection(base):  # type: ignore[valid-type,misc]
            num_received = 0  # bytes

            def connection_made(self, transport: asyncio.Transport) -> None:
                super().connection_made(transport)
                if owner.most is not None and len(self.connections) > owner.most:
                    owner._refuse(transport)

            def data_received(self, data: bytes) -> None:
                self.num_received += len(data)
                super().data_received(data)

            def connection_lost(self, exc: Exception | None) -> None:
                super().connection_lost(exc)
                _break_cycle(self.transport)

        return Connection

    def look(self, connections: set[Any]) -> None:
        """Leave those whose client has done nothing for too long. To be called about once a second."""
        if not self._timeout:
            return
        now, waiting, left = time.monotonic(), {}, 0
        for connection in list(connections):
            mark = _waits_at(connection)
            if mark is None:
                continue
            known, since = self._waiting.get(connection, (None, now))
            since = since if known == mark else now
            if now - since >= self._timeout:
                left += 1
                self._stats.fault("client_stalled")
                connection.transport.abort()
            else:
                waiting[connection] = mark, since
        self._waiting = waiting
        if left:
            text = "%d clients were left: for %g s they did not send their request or take their answer."
            logger.warning(text, left, self._timeout)

    def judge(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An exception handler of the event loop: a connection that cannot be accepted is no fault of the program."""
        fault = context.get("exception")
        if isinstance(fault, OSError) and fault.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            self._count_full(f"no connection can be accepted: {fault.strerror}")
        else:
            loop.default_exception_handler(context)

    def _refuse(self, transport: asyncio.Transport) -> None:
        self._count_full(f"there are {self.most} connections, and no room for more")
        transport.write(FULL)
        transport.close()

    def _count_full(self, text: str) -> None:
        self._stats.fault("connections_full")
        if time.monotonic() - self._told >= QUIET:
            self._told = time.monotonic()
            logger.warning("The server is full: %s.", text)


def _break_cycle(transport: Any) -> None:
    """Let go of a connection that has ended: asyncio's transport refers to itself, by way of its reading method.

    Else the socket's object and its buffers wait for Python's collector, which comes after some ten thousand of them.
    """
    if getattr(transport, "_read_ready_cb", None) is not None:
        transport._read_ready_cb = None  # nothing is read any more


def _waits_at(connection: Any) -> object | None:
    """Where the server waits for the client: equal as long as that does nothing; None: it does not wait.

    The head of a request has to come as a whole in time, a byte now and then does not count.
    """
    if unsent := connection.transport.get_write_buffer_size():
        return unsent, _queued(connection.transport)
    cycle = connection.cycle
    if cycle is None:
        return "first request"
    if cycle.response_complete:  # a timer of uvicorn's runs until the next request begins to come
        return ("next request", id(cycle)) if connection.timeout_keep_alive_task is None else None
    return ("body", connection.num_received) if cycle.more_body and not connection.flow.read_paused else None


def _queued(transport: asyncio.Transport) -> int:
    """Bytes in the kernel that the client has not taken: it makes room in lumps of a megabyte, this goes by bytes."""
    try:
        import fcntl
        import termios

        queued = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except (ImportError, OSError):  # Windows; another kind of socket
        return 0
    return int.from_bytes(queued, sys.byteorder)
