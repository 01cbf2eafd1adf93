"""Models: one decoder, one small file per family, and the loader that fills them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nanovllm.layers.weights import LayerContext
from nanovllm.models.decoder import Decoder
from nanovllm.models.loader import load_weights
from nanovllm.models.registry import ARCHITECTURES, declaration
from nanovllm.ops import Operators
from nanovllm.parallel import ParallelContext

__all__ = ["ARCHITECTURES", "Decoder", "build_model", "load_weights"]


def build_model(
    hf_config: dict[str, Any],
    architecture: str,
    *,
    dtype: torch.dtype,
    device: str,
    ops: Operators,
    parallel: ParallelContext,
    max_model_len: int,
) -> Decoder:
    """An empty model of ``architecture`` (config.json's name); ``load_weights`` fills it.

    ``max_model_len`` bounds the positions, and decides the kinds of RoPE that depend on it (layers/rope_scaling.py).
    Raises ModelError for an unknown architecture or a configuration that cannot be served, ParameterError for a number
    of ranks that the model cannot be split over.
    """
    spec = declaration(architecture)(hf_config)
    if architecture.endswith("Model"):
        spec = replace(spec, tied=True)  # saved without a head
    return Decoder(spec, LayerContext(dtype, device, ops, parallel), max_model_len)
