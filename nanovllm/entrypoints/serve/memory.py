"""Memory given back after large requests and after floods."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from functools import cache

MOST_KEPT = 4 << 20  # bytes of bodies after which memory is given back
LITTLE = 1 << 18  # bytes of bodies that are not worth a pause
FLOOD = 256  # connections; what fewer leave behind is not worth one either
MANY_BLOCKS = 50_000  # of Python's allocator, 5 to 10 MB; under load, so much may be garbage that has grown old
FEW_BLOCKS = 5_000  # the same at rest
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # malloc.h


def share_pools() -> None:
    """Have glibc's threads share two pools of memory, and give large blocks back as soon as they are free.

    By default every thread has a pool of its own, which keeps what its largest request took, and blocks count as large
    only beyond the largest that was ever freed. Pools that threads have already stay theirs.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 2)
        mallopt(M_MMAP_THRESHOLD, 1 << 20)


class Memory:
    """Counts what requests leave behind, and gives memory back now and then.

    What goes wrong with a body refers to itself, by way of the exception and its frames, and to the body. The
    collector counts objects, and such garbage is few and large: so it is called by the bytes. A tokenizer takes a
    hundred times the size of a text, on several threads, and the allocator keeps that for each of them.

    Under load only young objects are looked through, which is quick. But whatever is under way at that moment counts as
    old from then on, and only a full collection finds it when it is garbage: at rest, or when there may be much of it.
    """

    def __init__(self) -> None:
        self._num_bytes = 0  # of bodies since memory was given back
        self._peak = 0  # connections since then
        self._num_blocks = 0  # of Python's allocator, after the last full collection
        self._settled = False  # nothing was given back since that at rest

    def dealt_with(self, num_bytes: int) -> None:
        """A request with a body of so many bytes has ended."""
        self._num_bytes += num_bytes
        if self._num_bytes > MOST_KEPT:
            gc.collect(1)
            if self._left_behind() > MANY_BLOCKS:
                self._collect_all()
            self._give_back()
            self._settled = False

    def look(self, num_connections: int) -> None:
        """There are so many connections now. After a flood, or when there is nothing to do, memory is given back."""
        self._peak = max(self._peak, num_connections)
        after_flood = self._peak >= FLOOD and num_connections < self._peak // 4
        much = self._num_bytes > LITTLE or not self._settled or self._left_behind() > FEW_BLOCKS
        if after_flood or (num_connections == 0 and much):
            self._peak = num_connections
            self._collect_all()
            self._give_back()
            self._settled = num_connections == 0

    def _left_behind(self) -> int:
        """Blocks of Python's allocator that have come since the last full collection: garbage, and what is in use."""
        return sys.getallocatedblocks() - self._num_blocks

    def _collect_all(self) -> None:
        gc.collect()
        self._num_blocks = sys.getallocatedblocks()

    def _give_back(self) -> None:
        self._num_bytes = 0
        trim = _glibc("malloc_trim")
        if trim is not None:
            trim(0)


@cache
def _glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc's allocator; None with other C libraries."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
    return function
