"""Rows: what the runner remembers of every request between steps, and the input tensors of a step made from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nanovllm.ops.metadata import AttentionMetadata
from nanovllm.runner.ragged import Array, ragged_ranges, to_device

if TYPE_CHECKING:
    from nanovllm.engine.plan import StepPlan


@dataclass(slots=True)
class StepInput:
    """The input of one forward pass: T new tokens of B rows, S of which are sampled.

    Attributes:
        input_ids, positions: int64 [T].
        meta: where attention finds the rows' keys and values.
        sampled_tokens: int64 [S], index of the last new token of each sampled row; None if these are all tokens.
        sampled_rows, sampled_positions: int64 [S] on the host: table row, and position the sampled token will take.
    """

    input_ids: Tensor
    positions: Tensor
    meta: AttentionMetadata
    sampled_tokens: Tensor | None
    sampled_rows: Array
    sampled_positions: Array


class InputBatch:
    """Token ids and block table of every row.

    The token table lives on the device: sampling writes it and the next step reads it there, so no step waits for the
    host to learn a token. The block table lives on the host, where slots are computed from it. Both grow by doubling.

    No device checks what it is told to read and write, so that it is checked here: blocks when they enter the table,
    and that every new token has one.

    Args:
        num_blocks: of the cache, the padding block included.

    Attributes:
        tokens: int32 [max_rows, width] on the device; row r holds the request's known tokens, then leftovers.
        blocks: int32 [max_rows, width] on the host; block of positions [i * block_size, (i + 1) * block_size), then
            0, the padding block.
    """

    def __init__(self, max_rows: int, block_size: int, device: torch.device, num_blocks: int) -> None:
        self.block_size = block_size
        self._num_blocks = num_blocks
        self.device = device
        self.tokens = torch.zeros(max_rows, 256, dtype=torch.int32, device=device)
        self.blocks = np.zeros((max_rows, 16), np.int32)

    def start(self, row: int, token_ids: list[int]) -> None:
        """A request with these known tokens takes the row."""
        self._reserve_tokens(len(token_ids))
        self.tokens[row, : len(token_ids)] = to_device(np.array(token_ids, np.int32), self.device)
        self.blocks[row] = 0

    def update_blocks(self, updates: Iterable[tuple[int, int, list[int]]]) -> None:
        """Enter (row, first entry, block ids) into the block table.

        Raises:
            ValueError: a block that does not exist or is the padding block, or a gap before the first entry.
        """
        for row, first, ids in updates:
            end = first + len(ids)
            if ids and not 0 < min(ids) <= max(ids) < self._num_blocks:
                raise ValueError(f"row {row}: blocks {ids} are not all among 1 .. {self._num_blocks - 1}")
            if first and not (first <= self.blocks.shape[1] and self.blocks[row, first - 1]):
                raise ValueError(f"row {row}: no block before entry {first}")
            if end > self.blocks.shape[1]:
                more = max(end, 2 * self.blocks.shape[1]) - self.blocks.shape[1]
                self.blocks = np.pad(self.blocks, ((0, 0), (0, more)))
            self.blocks[row, first:end] = ids

    def _reserve_tokens(self, length: int) -> None:
        """Make room for ``length`` tokens in every row."""
        rows, width = self.tokens.shape
        if length > width:
            grown = torch.zeros(rows, max(length, 2 * width), dtype=torch.int32, device=self.device)
            grown[:, :width] = self.tokens
            self.tokens = grown

    def prepare(self, plan: StepPlan) -> StepInput:
        """The input tensors of a step; its starts and block updates have been applied.

        Raises:
            ValueError: a new token has no block to go to.
        """
        rows, num_computed, num_new = (np.array(x, np.int64) for x in (plan.rows, plan.num_computed, plan.num_new))
        seq_lens = num_computed + num_new
        self._reserve_tokens(int(seq_lens.max()) + 1)  # the sampled token included
        ends = np.cumsum(num_new)

        positions = ragged_ranges(num_computed, num_new)
        row_of_token = np.repeat(rows, num_new)
        block, offset = np.divmod(positions, self.block_size)
        table_index = row_of_token * self.tokens.shape[1] + positions
        slots = self.blocks[row_of_token, block].astype(np.int64) * self.block_size + offset
        if slots.min() < self.block_size:
            row = int(row_of_token[np.argmin(slots)])
            raise ValueError(f"row {row}: a new token has no block to go to")
        # One transfer for all three, int64 [3, T].
        on_device = to_device(np.stack([positions, table_index, slots]), self.device)

        max_seq_len = int(seq_lens.max())
        max_query_len = int(num_new.max())
        meta = AttentionMetadata(
            query_start_loc=[0, *ends.tolist()],
            seq_lens=seq_lens.tolist(),
            num_decodes=len(rows) if max_query_len == 1 else int(np.argmax(num_new != 1)),
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            block_table=to_device(self.blocks[rows, : -(-max_seq_len // self.block_size)], self.device),
            slot_mapping=on_device[2],
            block_size=self.block_size,
        )
        sampled = np.array(plan.sampled, np.int64)
        all_sampled = len(sampled) == len(positions)
        return StepInput(
            input_ids=self.tokens.view(-1).index_select(0, on_device[1]).to(torch.int64),
            positions=on_device[0],
            meta=meta,
            sampled_tokens=None if all_sampled else to_device(ends[sampled] - 1, self.device),
            sampled_rows=rows[sampled],
            sampled_positions=seq_lens[sampled],
        )

    def append(self, rows: Array, positions: Array, token_ids: Tensor) -> None:
        """Write sampled tokens (int64 [S]) to their rows: the next step's input."""
        index = to_device(rows * self.tokens.shape[1] + positions, self.device)
        self.tokens.view(-1).index_copy_(0, index, token_ids.to(torch.int32))
