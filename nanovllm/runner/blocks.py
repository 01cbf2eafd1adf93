"""Vocabulary rows in blocks: reduce every block first, then look into the few blocks that matter.

A pass that reduces [rows, vocab] to [rows, vocab / 128] runs at memory speed; argmax, top-k, a cumulative sum or a sort
of the whole vocabulary are 10 to 100 times slower. Every result of a row is computed from that row alone, in an order
that depends on the width only, so it has the same bits whatever other rows there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, N] as views: its whole blocks [R, N // BLOCK, BLOCK] and the short one at the end [R, N % BLOCK]."""
    count = x.shape[1] // BLOCK
    return x[:, : count * BLOCK].unflatten(1, (count, BLOCK)), x[:, count * BLOCK :]


def block_sum(x: Tensor) -> Tensor:
    """x [R, N] -> sums of its blocks [R, ceil(N / BLOCK)]; the last block may be short."""
    whole, tail = _split(x)
    sums = whole.sum(-1)
    return torch.cat([sums, tail.sum(-1, keepdim=True)], dim=1) if tail.shape[1] else sums


def block_max(x: Tensor) -> Tensor:
    """x [R, N] -> maxima of its blocks [R, ceil(N / BLOCK)]; NaN wins."""
    whole, tail = _split(x)
    maxima = whole.amax(-1)
    return torch.cat([maxima, tail.amax(-1, keepdim=True)], dim=1) if tail.shape[1] else maxima


def take_blocks(x: Tensor, blocks: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """The columns (int64) and values of ``blocks`` [R, n] of x [R, N]: two of [R, n * BLOCK].

    Columns past the end of a short last block hold ``fill`` and point at the last column.
    """
    columns = (blocks.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=x.device)).flatten(1)
    last = x.shape[1] - 1
    inside = columns.clamp(max=last)
    values = x.gather(1, inside)
    if x.shape[1] % BLOCK:
        values = values.masked_fill(columns > last, fill)
    return inside, values


def greater(x: Tensor, bound: Tensor) -> Tensor:
    """1.0 where x [R, N] > bound [R, 1], else 0.0: on a CPU several times faster to use than booleans."""
    return torch.gt(x, bound, out=torch.empty_like(x))


def argmax(x: Tensor) -> Tensor:
    """The first column of every row's maximum: x [R, N] -> int64 [R]. A row with NaN gives a column that holds one."""
    block = block_max(x).argmax(-1, keepdim=True)
    columns, values = take_blocks(x, block, -torch.inf)
    return columns.gather(1, values.argmax(-1, keepdim=True)).squeeze(1)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of every row in descending order, and their columns: two of [R, k].

    The k largest values lie in the k blocks with the largest maxima.
    """
    num_blocks = -(-x.shape[1] // BLOCK)
    if 4 * k > num_blocks:  # the blocks would be a large part of the row: no gain
        values, columns = x.topk(k, dim=-1)
        return values, columns
    columns, values = take_blocks(x, block_max(x).topk(k, dim=-1).indices, -torch.inf)
    values, index = values.topk(k, dim=-1)
    return values, columns.gather(1, index)
