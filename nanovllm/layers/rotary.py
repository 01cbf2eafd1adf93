"""The table of rotations, one for all layers."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.layers.rope_scaling import RopeConfig, rope_frequencies
from nanovllm.layers.weights import LayerContext


class RotaryTable:
    """cos and sin of every position up to ``max_model_len``, each [max_model_len, head_dim] in the model's dtype.

    Both halves of a head turn by the same angles; the minus sign of the rotation is in the first half of sin.
    A table, not a formula evaluated each step: so a position's rotation has the same bits in every batch.
    """

    def __init__(self, rope: RopeConfig, max_model_len: int, context: LayerContext) -> None:
        frequencies, attention_factor = rope_frequencies(rope, max_model_len)
        angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * frequencies
        cos, sin = ((f(angles) * attention_factor).to(context.dtype) for f in (torch.cos, torch.sin))
        self.ops = context.ops
        self.cos = torch.cat((cos, cos), -1).to(context.device)
        self.sin = torch.cat((-sin, sin), -1).to(context.device)

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [T] -> cos and sin [T, 1, head_dim] as the operator ``norm_rotate_write`` takes them."""
        gather = self.ops.weight_rows
        return gather(self.cos, positions).unsqueeze(1), gather(self.sin, positions).unsqueeze(1)
