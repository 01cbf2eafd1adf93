"""The operator table: the one contract between the engine and a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.ops.metadata import AttentionMetadata

Array = np.ndarray[Any, Any]
Forward = Callable[[Tensor, Tensor, AttentionMetadata], Tensor]  # input_ids, positions, meta -> hidden states
# num_blocks, block_size, kv_heads, head_dim, dtype, device -> keys or values of a layer, blocks first; block 0 is zero.
NewCache = Callable[[int, int, int, int, torch.dtype, torch.device], Tensor]
# layers, then as NewCache -> keys and values of every layer, made together; their blocks need not be neighbours.
NewCaches = Callable[[int, int, int, int, int, torch.dtype, torch.device], list[tuple[Tensor, Tensor]]]
# logits float32 [S, V], then arrays [S]: temperature (0: greedy), top_k (0: off), top_p, min_p, seeds uint64, positions
# -> tokens int64 [S]. The meaning is that of runner/choice.py.
Choose = Callable[[Tensor, Array, Array, Array, Array, Array, Array], Tensor]
# logits float32 [R, V], then arrays [R]: top_k (0: off), top_p (1: off), min_p (0: off) -> logits with everything that
# may not be drawn at -inf.
KeepLikeliest = Callable[[Tensor, Array, Array, Array], Tensor]
# logits float32 [S, V], changed in place; the token table int32 [max_rows, width]; then arrays [n], one entry for each
# row of logits concerned: its number, its row of the table, the position to be chosen, its prompt's length (int64),
# repetition (1: off), frequency and presence (0: off; float32). The meaning is that of runner/logit_rules.py.
Penalise = Callable[[Tensor, Tensor, Array, Array, Array, Array, Array, Array, Array], None]


@dataclass(frozen=True)
class AttentionShape:
    """What the speed of a model's attention depends on.

    Attributes:
        window: of its first layer; None: full attention.
        rows: most rows of a step.
        longest: most tokens of a row.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    window: int | None
    rows: int
    longest: int


@dataclass(frozen=True)
class Operators:
    """Every operator a model may call. ``ops/reference.py`` defines each of them in plain torch and says what it
    computes; a device replaces those it does better. T tokens, H query heads, Hk KV heads, D head_dim.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    silu_and_mul: Callable[[Tensor], Tensor]
    gelu_and_mul: Callable[[Tensor, str], Tensor]
    pack_linear: Callable[[Tensor], Any]
    linear: Callable[[Tensor, Any, Tensor | None], Tensor]
    weight_rows: Callable[[Any, Tensor], Tensor]
    norm_rotate_write: Callable[
        [Any, Tensor | None, Tensor | None, float, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor
    ]
    copy_blocks: Callable[[Sequence[tuple[Tensor, Tensor]], Sequence[int], Sequence[int]], None]
    prepare_attention: Callable[[AttentionMetadata, Sequence[int | None], torch.dtype], None]
    paged_attention: Callable[[Tensor, Tensor, Tensor, AttentionMetadata, float, int | None], Tensor]
    record: Callable[..., Forward | None]
    keep_likeliest: KeepLikeliest  # for ``choose_by_sorting``
    # Rows, columns, dtype -> memory for a weight, which ``pack_linear`` may then pack where it lies. None: any memory.
    allocate_matrix: Callable[[int, int, torch.dtype], Tensor] | None = None
    # x, packed, bias, widths of its parts -> each part of the product as a tensor of its own, for q, k and v.
    # ``norm_rotate_write`` then takes them in place of the whole. None: the whole is better.
    linear_parts: Callable[[Tensor, Any, Tensor | None, Sequence[int]], Sequence[Tensor]] | None = None
    choose: Choose | None = None  # None: runner/choice.py, with torch
    choose_by_sorting: bool = False  # which of its ways, without ``choose``: one that never waits for the device
    penalise: Penalise | None = None  # None: runner/logit_rules.py, with torch
    new_cache: NewCache | None = None  # None: [num_blocks, block_size, kv_heads, head_dim]
    new_caches: NewCaches | None = None  # None: each on its own, with ``new_cache``
    tune: Callable[[AttentionShape, torch.device], None] | None = None  # chooses attention for a model
