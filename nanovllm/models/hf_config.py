"""Reading a checkpoint's config.json as transformers does, with errors that name what is wrong."""

from __future__ import annotations

from typing import Any

from nanovllm.errors import ModelError
from nanovllm.layers.rope_scaling import RopeConfig


def require(config: dict[str, Any], name: str) -> Any:
    """A value the configuration must have."""
    value = config.get(name)
    if value is None:
        raise ModelError(f"the checkpoint's config.json lacks {name!r}")
    return value


def common_fields(config: dict[str, Any], *, head_dim: int | None, max_position_embeddings: int) -> dict[str, Any]:
    """The fields of a `DecoderSpec` that every family reads alike.

    ``head_dim`` is the family's default (None: hidden_size / num_attention_heads), ``max_position_embeddings`` too.
    """
    num_heads = require(config, "num_attention_heads")
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise ModelError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    head_dim = config.get("head_dim") or head_dim or require(config, "hidden_size") // num_heads
    return {
        "vocab_size": require(config, "vocab_size"),
        "hidden_size": require(config, "hidden_size"),
        "intermediate_size": require(config, "intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "activation": config.get("hidden_act", "silu"),
        "rope": RopeConfig.from_hf(config, head_dim, max_position_embeddings),
        "tied": config.get("tie_word_embeddings", False),
    }


def qwen_windows(config: dict[str, Any]) -> tuple[int | None, ...]:
    """The sliding window of each layer, by the rules of the Qwen family.

    ``use_sliding_window`` must be set; then ``layer_types`` says which layers slide, or else those from
    ``max_window_layers`` on.
    """
    layers = require(config, "num_hidden_layers")
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28)
        types = ["sliding_attention" if number >= first else "full_attention" for number in range(layers)]
    if len(types) != layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise ModelError(f"layer_types must name sliding_attention or full_attention {layers} times, got {types}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)
