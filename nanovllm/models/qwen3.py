"""Qwen3 (dense): the norm of each q and k head replaces the bias of Qwen2; head_dim is 128 unless given."""

from __future__ import annotations

from typing import Any

from nanovllm.models.decoder import DecoderSpec
from nanovllm.models.hf_config import common_fields, qwen_windows


def declare(config: dict[str, Any]) -> DecoderSpec:
    """q/k norm is part of the architecture: no configuration switches it."""
    bias = config.get("attention_bias", False)
    return DecoderSpec(
        **common_fields(config, head_dim=128, max_position_embeddings=32768),
        windows=qwen_windows(config),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )
