"""Random batches over a paged cache, for the tests of attention kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanovllm.ops import AttentionMetadata


class PagedBatch:
    """Requests with keys and values in shuffled blocks of one cache; block 0 and unused slots hold NaN.

    Args:
        lengths: tokens each request has in the cache.
        heads, kv_heads, head_dim, block_size, dtype: as in the attention operator.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lengths = list(lengths)
        self.block_size = block_size
        counts = [-(-length // block_size) for length in lengths]
        shape = (sum(counts) + 1, block_size, kv_heads, head_dim)
        self.k_cache = torch.full(shape, float("nan"), dtype=dtype)
        self.v_cache = torch.full(shape, float("nan"), dtype=dtype)
        order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in counts]
        self.q = [torch.randn(length, heads, head_dim, generator=generator).to(dtype) for length in lengths]
        for row, length in enumerate(lengths):
            slots = self.slots(row, 0, length)
            for cache in (self.k_cache, self.v_cache):
                cache.flatten(0, 1)[slots] = torch.randn(length, kv_heads, head_dim, generator=generator).to(dtype)

    def slots(self, row: int, start: int, end: int) -> Tensor:
        """The slots of a request's positions start .. end, int64."""
        size = self.block_size
        return torch.tensor([self.tables[row][p // size] * size + p % size for p in range(start, end)]).long()

    def step(self, chunks: Sequence[tuple[int, int, int]]) -> tuple[Tensor, AttentionMetadata]:
        """The queries of ``chunks``, (request, start, end) each, and their metadata."""
        starts = [0]
        for _, start, end in chunks:
            starts.append(starts[-1] + end - start)
        table = torch.zeros(len(chunks), max(map(len, self.tables), default=1) + 1, dtype=torch.int32)
        for i, (row, _, _) in enumerate(chunks):
            table[i, : len(self.tables[row])] = torch.tensor(self.tables[row], dtype=torch.int32)
        sizes = [end - start for _, start, end in chunks]
        decodes = next((i for i, size in enumerate(sizes) if size != 1), len(sizes))
        meta = AttentionMetadata(
            query_start_loc=starts,
            seq_lens=[end for _, _, end in chunks],
            num_decodes=decodes,
            max_query_len=max(sizes),
            max_seq_len=max(end for _, _, end in chunks),
            block_table=table,
            slot_mapping=torch.cat([self.slots(*chunk) for chunk in chunks]),
            block_size=self.block_size,
        )
        return torch.cat([self.q[row][start:end] for row, start, end in chunks]), meta
