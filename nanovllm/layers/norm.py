"""Root-mean-square norm."""

from __future__ import annotations

from torch import Tensor

from nanovllm.layers.weights import LayerContext, Slots, WeightSlot


class RMSNorm:
    """x / rms(x) * weight over the last dimension of ``size``; whole on every rank."""

    def __init__(self, size: int, eps: float, context: LayerContext) -> None:
        self.ops = context.ops
        self.weight = context.empty(size)
        self.eps = eps

    def slots(self, name: str) -> Slots:
        """The slot of the weight called ``name``."""
        return {f"{name}.weight": WeightSlot(self.weight, (self.weight.shape[0],))}

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size]."""
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """``(norm(x + residual), x + residual)``; before the first layer there is no residual yet."""
        if residual is None:
            return self(x), x
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)
