"""Frames over a stream socket: four bytes of length, little-endian, then that many bytes.

Nothing here waits. What the other side has not taken yet is kept, so a peer that lags costs memory and no time.
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress

_LENGTH = struct.Struct("<I")
_LONGEST_FRAME = 1 << 30  # bytes; more is not a frame of ours
_CHUNK = 1 << 18


class ChannelClosed(ConnectionError):
    """The peer has gone."""


class Channel:
    """One end of a connection.

    Attributes:
        backlog: bytes that the peer has not taken yet.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, 1 << 20)
        self._socket = connection
        self._unsent = bytearray()
        self._received = bytearray()

    def fileno(self) -> int:
        """The socket's, to wait for it; -1 once it is closed."""
        return self._socket.fileno()

    @property
    def backlog(self) -> int:
        return len(self._unsent)

    def send(self, payload: bytes) -> None:
        """Send a frame, or as much of it as the peer takes now.

        Raises:
            ChannelClosed: the peer has gone.
        """
        self._unsent += _LENGTH.pack(len(payload))
        self._unsent += payload
        self.flush()

    def flush(self) -> None:
        """Send more of the backlog. Raises ChannelClosed if the peer has gone."""
        sent = 0
        try:
            with memoryview(self._unsent) as unsent:
                while sent < len(unsent):
                    sent += self._socket.send(unsent[sent : sent + _CHUNK])
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            raise ChannelClosed(f"the other side has gone: {error}") from error
        finally:
            del self._unsent[:sent]

    def receive(self) -> list[bytes]:
        """The frames that have arrived, at most a few hundred kilobytes at a time unless one is longer.

        Raises:
            ChannelClosed: the peer has gone, and all it sent was received before.
            ValueError: a frame of impossible length.
        """
        try:
            data = self._socket.recv(_CHUNK)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as error:
            raise ChannelClosed(f"the other side has gone: {error}") from error
        if not data:
            raise ChannelClosed("the other side has gone")
        received, frames, start = self._received, [], 0
        received += data
        while len(received) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(received, start)
            if length > _LONGEST_FRAME:
                raise ValueError(f"a frame of {length} bytes is none of ours")
            end = start + _LENGTH.size + length
            if len(received) < end:
                break
            frames.append(bytes(received[start + _LENGTH.size : end]))
            start = end
        del received[:start]
        return frames

    def end(self) -> None:
        """Tell the peer that nothing more will come; it may still answer."""
        with suppress(OSError):  # it has gone already
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()
