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


@torch.inference_mode()
def try_step(config: EngineConfig, model: Decoder, kv_caches: KVCaches) -> None:
    """Run a step of the largest size on caches of one block, which all its tokens share: its result means nothing."""
    block_size, device = config.cache.block_size, model.norm.weight.device
    total, longest = config.scheduler.max_num_batched_tokens, config.model.max_model_len
    lengths = [min(longest, total - start) for start in range(0, total, longest)]
    starts = [0, *np.cumsum(lengths).tolist()]
    meta = AttentionMetadata(
        query_start_loc=starts,
        seq_lens=lengths,
        num_decodes=0,
        max_query_len=max(lengths),
        max_seq_len=max(lengths),
        block_table=torch.zeros(len(lengths), -(-max(lengths) // block_size), dtype=torch.int32, device=device),
        slot_mapping=torch.zeros(total, dtype=torch.int64, device=device),
        block_size=block_size,
    )
    token_ids = torch.zeros(total, dtype=torch.int64, device=device)
    positions = torch.arange(total, device=device) % longest
    hidden = model.forward(token_ids, positions, kv_caches, meta)
    logits = model.compute_logits(hidden[: config.scheduler.max_num_seqs])
    torch.softmax(logits, dim=-1)
