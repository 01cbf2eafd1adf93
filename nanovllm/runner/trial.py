"""What is tried at the start: attention, and a step of the largest size, for its memory and to compile its kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from nanovllm.ops import AttentionMetadata, Operators
from nanovllm.ops.operators import AttentionShape

if TYPE_CHECKING:
    from nanovllm.config import EngineConfig
    from nanovllm.models import Decoder
    from nanovllm.models.decoder import KVCaches


def tune_attention(config: EngineConfig, model: Decoder, ops: Operators) -> None:
    """Have the device choose its attention for this model, where it has a choice."""
    if ops.tune is None:
        return
    spec = model.spec
    shape = AttentionShape(
        num_heads=spec.num_heads * model.num_kv_heads // spec.num_kv_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_size=config.cache.block_size,
        dtype=model.dtype,
        kv_dtype=model.kv_dtype,
        window=spec.windows[0],
        rows=config.scheduler.max_num_seqs,
        longest=config.model.max_model_len,
    )
    ops.tune(shape, model.norm.weight.device)


def _trial_lengths(config: EngineConfig) -> list[int]:
    """Tokens of the rows of a step of the largest size."""
    total, longest = config.scheduler.max_num_batched_tokens, config.model.max_model_len
    return [min(longest, total - start) for start in range(0, total, longest)]


def trial_blocks(config: EngineConfig) -> int:
    """Blocks of the cache that ``try_step`` writes to, the padding block included."""
    return 1 + sum(-(-length // config.cache.block_size) for length in _trial_lengths(config))


@torch.inference_mode()
def try_step(config: EngineConfig, model: Decoder, kv_caches: KVCaches) -> None:
    """Run a step of the largest size on caches of ``trial_blocks``, which all layers may share: its result means
    nothing."""
    block_size, device = config.cache.block_size, model.norm.weight.device
    lengths, longest = _trial_lengths(config), config.model.max_model_len
    total, width = sum(lengths), -(-max(lengths) // block_size)
    starts = [0, *np.cumsum(lengths).tolist()]
    table = torch.zeros(len(lengths), width, dtype=torch.int32)
    slots, first = [], 1
    for row, length in enumerate(lengths):
        count = -(-length // block_size)
        table[row, :count] = torch.arange(first, first + count)
        slots.append(first * block_size + torch.arange(length))
        first += count
    meta = AttentionMetadata(
        query_start_loc=starts,
        seq_lens=lengths,
        num_decodes=0,
        max_query_len=max(lengths),
        max_seq_len=max(lengths),
        block_table=table.to(device),
        slot_mapping=torch.cat(slots).to(device),
        block_size=block_size,
    )
    token_ids = torch.zeros(total, dtype=torch.int64, device=device)
    positions = torch.arange(total, device=device) % longest
    hidden = model.forward(token_ids, positions, kv_caches, meta)
    logits = model.compute_logits(hidden[: config.scheduler.max_num_seqs])
    torch.softmax(logits, dim=-1)
