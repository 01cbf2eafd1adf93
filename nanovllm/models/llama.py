"""Llama 2, 3, 3.1, 3.2 and the many models of their architecture."""

from __future__ import annotations

from typing import Any

from nanovllm.models.decoder import DecoderSpec
from nanovllm.models.hf_config import common_fields, require


def declare(config: dict[str, Any]) -> DecoderSpec:
    """The plain decoder; biases only where the configuration asks for them."""
    bias = config.get("attention_bias", False)
    return DecoderSpec(
        **common_fields(config, head_dim=None, max_position_embeddings=2048),
        windows=(None,) * require(config, "num_hidden_layers"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.get("mlp_bias", False),
    )
