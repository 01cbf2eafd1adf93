"""The gated feed-forward network."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nanovllm.errors import ModelError
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear, Rows
from nanovllm.layers.weights import LayerContext
from nanovllm.ops import Operators


def gated_activation(name: str, ops: Operators) -> Callable[[Tensor], Tensor]:
    """The operator behind a config's ``hidden_act``; ModelError for one we do not know."""
    if name == "silu":
        return ops.silu_and_mul
    if name == "gelu":
        return lambda x: ops.gelu_and_mul(x, "none")
    if name in ("gelu_new", "gelu_pytorch_tanh"):
        return lambda x: ops.gelu_and_mul(x, "tanh")
    raise ModelError(f"hidden_act {name!r} is not supported; known: silu, gelu, gelu_new, gelu_pytorch_tanh")


class GatedMLP:
    """down(act(gate(x)) * up(x)), gate and up as one product."""

    def __init__(self, hidden_size: int, inner: Rows, activation: str, bias: bool, context: LayerContext) -> None:
        self.gate_up = ColumnParallelLinear(hidden_size, [inner, inner], bias, context)
        self.down = RowParallelLinear(inner, hidden_size, bias, context)
        self.activation = gated_activation(activation, context.ops)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        return self.down(self.activation(self.gate_up(x)))
