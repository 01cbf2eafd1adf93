"""Large pages for what is read from end to end at every step: weights, keys and values."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache

import torch
from torch import Tensor

from nanovllm.reserve import HUGE_PAGE, take_reserve

_MADV_HUGEPAGE = 14
_CHUNK = 64 * HUGE_PAGE
_ALIGNMENT = 64  # a cache line


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
    start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    size = tensor.data_ptr() + tensor.nbytes - start
    madvise = _madvise()
    if madvise is not None and size >= HUGE_PAGE and start % mmap.PAGESIZE == 0:
        madvise(start, size // HUGE_PAGE * HUGE_PAGE, _MADV_HUGEPAGE)


class Arena:
    """Memory for many weights, side by side in large chunks: all but a chunk's edges lie in large pages.

    On its own, a weight of a few MB would often get memory that the process has used before, in small pages. A chunk
    lives as long as one of the tensors in it; what is never written takes no memory. The first is what ``reserve`` has
    made ready, if there is any.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def allocate(self, size: int) -> Tensor:
        """An uninitialised tensor uint8 [size], aligned to cache lines."""
        if self._used + size > self._chunk.nbytes:
            self._chunk = self._new_chunk(size)
            self._used = -self._chunk.data_ptr() % HUGE_PAGE
        memory = self._chunk[self._used : self._used + size]
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return memory

    @staticmethod
    def _new_chunk(size: int) -> Tensor:
        reserve = take_reserve()
        if reserve is not None and len(reserve) >= size + HUGE_PAGE:
            return torch.frombuffer(reserve, dtype=torch.uint8)
        chunk = torch.empty(max(size, _CHUNK) + HUGE_PAGE, dtype=torch.uint8)
        advise_huge_pages(chunk)
        return chunk


def new_caches(
    layers: int,
    num_blocks: int,
    block_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer, each [num_blocks, block_size, kv_heads, head_dim]; block 0 is zero.

    All that belongs to a block lies together, layer after layer. So memory is taken block by block, as blocks are first
    written; with a cache for each layer, large pages would be half empty in every one of them.
    """
    memory = torch.empty((num_blocks, layers, 2, block_size, kv_heads, head_dim), dtype=dtype, device=device)
    advise_huge_pages(memory)
    memory[0].zero_()
    return [(memory[:, layer, 0], memory[:, layer, 1]) for layer in range(layers)]
