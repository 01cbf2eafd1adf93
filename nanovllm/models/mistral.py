"""Mistral 7B and its kin: a Llama whose layers all slide, where the configuration gives a window."""

from __future__ import annotations

from typing import Any

from nanovllm.models.decoder import DecoderSpec
from nanovllm.models.hf_config import common_fields, require


def declare(config: dict[str, Any]) -> DecoderSpec:
    """``sliding_window`` null means full attention (from v0.2 on); absent, it is the 4,096 of v0.1."""
    window = config.get("sliding_window", 4096)
    return DecoderSpec(
        **common_fields(config, head_dim=None, max_position_embeddings=131072),
        windows=(window,) * require(config, "num_hidden_layers"),
    )
