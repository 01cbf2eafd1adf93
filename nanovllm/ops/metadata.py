"""What attention must know of a step, apart from the vectors themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(slots=True)
class AttentionMetadata:
    """A batch of B rows with T new tokens in all; built once per step and shared by every layer.

    Row ``i`` computes tokens ``query_start_loc[i] .. query_start_loc[i + 1]`` of the flat batch. They are the *last*
    ``query_len`` of its ``seq_lens[i]`` tokens, so the causal mask is aligned to the end: query ``j`` of the row stands
    at position ``seq_lens[i] - query_len + j`` and sees the cache up to and including itself.

    ::

        cache of row i    0 1 2 3 4 5 6 | 7 8 9        seq_len 10
        new tokens                        q q q        query_len 3, already written when attention runs
    """

    query_start_loc: list[int]  # host, [B + 1]
    seq_lens: list[int]  # host, [B]: tokens in the cache after this step
    num_decodes: int  # rows 0 .. num_decodes - 1 have exactly one new token
    max_query_len: int
    max_seq_len: int
    block_table: Tensor  # int32 [B, width], width >= ceil(max_seq_len / block_size)
    slot_mapping: Tensor  # int64 [T]: block * block_size + offset of every new token
    block_size: int
    backend: Any = None  # what prepare_attention derives from the above, once, for all layers
