"""The table of rotations, one for all layers."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.layers.rope_scaling import RopeConfig, rope_frequencies


class RotaryTable:
    """cos and sin of every position up to ``max_model_len``, float32 [max_model_len, head_dim], cos | sin.

    A table, not a formula evaluated each step: so a position's rotation has the same bits in every batch.
    """

    def __init__(self, rope: RopeConfig, max_model_len: int, dtype: torch.dtype, device: str) -> None:
        frequencies, attention_factor = rope_frequencies(rope, max_model_len)
        angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * frequencies
        self.table = (torch.cat((angles.cos(), angles.sin()), -1) * attention_factor).to(device)
        self.dtype = dtype

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [T] -> cos and sin [T, 1, head_dim] as the operator ``rotary`` takes them.

        Both halves of a head turn by the same angles; the minus sign of the rotation is in the first half of sin.
        """
        cos, sin = self.table.index_select(0, positions).to(self.dtype).unsqueeze(1).chunk(2, -1)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
