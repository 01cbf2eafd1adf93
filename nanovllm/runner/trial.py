"""A step of the largest size, tried at the start: to see what memory it takes, and to have its kernels compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from nanovllm.ops import AttentionMetadata

if TYPE_CHECKING:
    from nanovllm.config import EngineConfig
    from nanovllm.models import Decoder
    from nanovllm.models.decoder import KVCaches


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
