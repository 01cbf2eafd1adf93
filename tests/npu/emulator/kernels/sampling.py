"""ApplyTopKTopP: what the fused sampling filter does, step by step as documented."""

from __future__ import annotations

import torch

from .decode import Tensor
from .registry import IS_310P, SOC, operator, require


def _check(logits: Tensor, p: Tensor | None, k: Tensor | None, out: Tensor) -> None:
    require(not IS_310P, f"the operator does not exist on {SOC}")
    require(p is not None or k is not None, "p and k must not both be None")
    require(logits.dim() == 2, f"logits must have 2 dimensions, not {tuple(logits.shape)}")
    if p is not None:
        require(p.dtype == logits.dtype, f"p is {p.dtype}, logits {logits.dtype}")
        require(p.shape == logits.shape[:1], f"p {tuple(p.shape)}, logits {tuple(logits.shape)}")
    if k is not None:
        require(k.dtype == torch.int32, f"k must be int32, not {k.dtype}")
        require(k.shape == logits.shape[:1], f"k {tuple(k.shape)}, logits {tuple(logits.shape)}")


@operator("ApplyTopKTopP", check=_check)
def apply_top_k_top_p(logits: Tensor, p: Tensor | None, k: Tensor | None, out: Tensor) -> None:
    values, order = logits.float().sort(dim=-1, stable=True)
    if k is not None:
        most = min(1024, logits.shape[1])
        require(bool(((k >= 1) & (k <= most)).all()), f"k must be in 1..{most}: {k.tolist()}")
        threshold = values.gather(1, (logits.shape[1] - k.long())[:, None])
        values = values.masked_fill(values < threshold, float("-inf"))
    if p is not None:
        require(bool(((p >= 0) & (p <= 1)).all()), f"p must be in 0..1: {p.tolist()}")
        hidden = values.softmax(-1).cumsum(-1) <= 1 - p.float()[:, None]
        hidden[:, -1] = False
        values = values.masked_fill(hidden, float("-inf"))
    out.copy_(torch.empty_like(values).scatter_(1, order, values))
