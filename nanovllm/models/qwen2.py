"""Qwen2 and Qwen2.5: biased q, k and v; optional sliding window in the upper layers."""

from __future__ import annotations

from typing import Any

from nanovllm.models.decoder import DecoderSpec
from nanovllm.models.hf_config import common_fields, qwen_windows


def declare(config: dict[str, Any]) -> DecoderSpec:
    """The bias is part of the architecture: no configuration switches it."""
    return DecoderSpec(
        **common_fields(config, head_dim=None, max_position_embeddings=32768),
        windows=qwen_windows(config),
        qkv_bias=True,
    )
