"""Large pages for what is read from end to end at every step."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache

from torch import Tensor

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


@cache
def _madvise() -> ctypes._NamedFuncPointer | None:  # type: ignore[name-defined]
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def advise_huge_pages(tensor: Tensor) -> None:
    """Ask Linux for 2 MB pages under a tensor that has not been written yet: fewer page faults, fewer TLB misses.

    Merely advice: nothing happens where the system knows no such pages.
    """
    start = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    size = tensor.data_ptr() + tensor.nbytes - start
    madvise = _madvise()
    if madvise is not None and size >= _HUGE_PAGE and start % mmap.PAGESIZE == 0:
        madvise(start, size // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
