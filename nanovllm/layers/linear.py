"""Linear layers, fused and split over ranks.

A column-parallel layer splits its outputs: each rank computes some of them from the whole input. A row-parallel layer
splits its inputs, which a column-parallel one has left distributed, and sums the partial results (Megatron-LM,
Shoeybi et al. 2019). A pair of the two costs one all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nanovllm.layers.weights import LayerContext, Slots, WeightSlot


@dataclass(frozen=True)
class Rows:
    """This rank's share of the output rows of one checkpoint matrix: ``start .. start + count`` of ``total``."""

    total: int
    start: int
    count: int


class Linear:
    """y = x W^T + b, with W [out, in] of this rank. ``finish`` must be called once the weights are in."""

    def __init__(self, in_features: int, out_features: int, bias: bool, context: LayerContext) -> None:
        self.ops = context.ops
        self.weight = context.empty_matrix(out_features, in_features)
        self.bias = context.empty(out_features) if bias else None
        self.packed: Any = None

    def finish(self) -> None:
        """Bring the weight into the operator's own form; where that is a copy, the original is given up. Idempotent."""
        if self.packed is None:
            self.packed = self.ops.pack_linear(self.weight)
            del self.weight

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        return self.ops.linear(x, self.packed, self.bias)


class ColumnParallelLinear(Linear):
    """Several checkpoint matrices with one input (q, k and v; gate and up) as one product."""

    def __init__(self, in_features: int, parts: Sequence[Rows], bias: bool, context: LayerContext) -> None:
        super().__init__(in_features, sum(part.count for part in parts), bias, context)
        self.parts = parts

    def slots(self, names: Sequence[str]) -> Slots:
        """The slots of the matrices (and biases) called ``names``, in the order of the parts."""
        found: Slots = {}
        row = 0
        for name, part in zip(names, self.parts, strict=True):
            weight = self.weight[row : row + part.count]
            found[f"{name}.weight"] = WeightSlot(weight, (part.total, weight.shape[1]), 0, part.start, self)
            if self.bias is not None:
                bias = self.bias[row : row + part.count]
                found[f"{name}.bias"] = WeightSlot(bias, (part.total,), 0, part.start, self)
            row += part.count
        return found

    def split(self, x: Tensor, divide: Callable[..., Sequence[Tensor]]) -> Sequence[Tensor]:
        """x [T, in] -> each part [T, its rows], by the operator ``linear_parts``."""
        return divide(x, self.packed, self.bias, [part.count for part in self.parts])


class RowParallelLinear(Linear):
    """One checkpoint matrix whose input is split over the ranks."""

    def __init__(self, columns: Rows, out_features: int, bias: bool, context: LayerContext) -> None:
        super().__init__(columns.count, out_features, bias, context)
        self.columns = columns
        self.parallel = context.parallel

    def slots(self, name: str) -> Slots:
        """The slot of the matrix (and the bias, whole on every rank) called ``name``."""
        out_features = self.weight.shape[0]
        shape, start = (out_features, self.columns.total), self.columns.start
        found = {f"{name}.weight": WeightSlot(self.weight, shape, 1, start, self)}
        if self.bias is not None:
            found[f"{name}.bias"] = WeightSlot(self.bias, (out_features,), layer=self)
        return found

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in of this rank] -> [T, out], summed over the ranks; the bias enters the sum once, at rank 0."""
        bias = self.bias if self.parallel.rank == 0 else None
        return self.parallel.all_reduce(self.ops.linear(x, self.packed, bias))
