"""Where the consumer of a request's outputs waits, and how many consumers are woken at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.engine.messages import Add
    from nanovllm.engine.output import AnyOutput

WOKEN_AT_ONCE = 16  # consumers; each takes the event loop some 30 microseconds to write a token


class Stream:
    """Wakes a consumer. Outputs are not queued: whoever is slow finds all that is new as one output.

    Attributes:
        end: the last word, an output or why there is none; None while the `OutputProcessor` has the outputs.
        command: what the core was told, as long as another core may be told the same.
    """

    __slots__ = ("_waiter", "command", "end")

    def __init__(self) -> None:
        self.end: AnyOutput | BaseException | None = None
        self.command: Add | None = None
        self._waiter: asyncio.Future[None] | None = None

    def close(self, end: AnyOutput | BaseException) -> None:
        """Give the last word, the first time."""
        self.end = self.end or end
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Until `wake`."""
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter


class Waker:
    """Wakes streams, a few in each turn of the event loop.

    A step has outputs for a thousand streams at the same moment. Woken at once, they would be written in one turn of
    the loop, tens of milliseconds long, and whoever asks for something else, be it the metrics, would wait for its end.
    """

    def __init__(self) -> None:
        self._asleep: deque[Stream] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None  # on which `_turn` is due

    def wake(self, streams: Iterable[Stream]) -> None:
        """Wake streams: the first now, the others in the next turns, in this order."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:  # their turn will come
            self._asleep.extend(streams)
            return
        self._loop = loop
        self._asleep = deque(streams)  # those of a loop that has ended have nobody who waits
        self._turn()

    def _turn(self) -> None:
        asleep = self._asleep
        for _ in range(min(WOKEN_AT_ONCE, len(asleep))):
            asleep.popleft().wake()
        if asleep and self._loop is not None:
            self._loop.call_soon(self._turn)
        else:
            self._loop = None
