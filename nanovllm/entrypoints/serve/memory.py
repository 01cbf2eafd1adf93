"""Memory given back after large requests."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from functools import cache

MOST_KEPT = 4 << 20  # bytes of bodies after which memory is given back


class GiveBack:
    """Counts bytes of bodies, and gives memory back now and then.

    What goes wrong with a body refers to itself, by way of the exception and its frames, and to the body. The
    collector counts objects, and such garbage is few and large: so it is called by the bytes. A tokenizer takes a
    hundred times the size of a text, on several threads, and the allocator keeps that for each of them.
    """

    def __init__(self) -> None:
        self._num_bytes = 0

    def dealt_with(self, num_bytes: int) -> None:
        """A request with a body of so many bytes has ended."""
        self._num_bytes += num_bytes
        if self._num_bytes > MOST_KEPT:
            self._num_bytes = 0
            gc.collect(1)  # it is young
            trim = _malloc_trim()
            if trim is not None:
                trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Glibc's function that returns free memory to the system; None with other C libraries."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return trim
