"""Where the consumer of a request's outputs waits."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.engine.messages import Add
    from nanovllm.engine.output import AnyOutput


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
