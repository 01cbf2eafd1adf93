"""Arithmetic, comparisons and activations, element by element.

Results are computed as torch computes them on the CPU and cast to the output's dtype by ``copy_``.
"""

from __future__ import annotations

import torch

from .decode import Scalar, Tensor, float32, int32
from .registry import operator, require


def _same_shape(*tensors: Tensor) -> tuple[int, ...]:
    return torch.broadcast_shapes(*(tensor.shape for tensor in tensors))


def check_binary(self: Tensor, other: Tensor, *rest: object) -> None:
    """Operands broadcast to the output's shape."""
    out = rest[-1] if rest and isinstance(rest[-1], torch.Tensor) else self
    require(
        tuple(_same_shape(self, other)) == tuple(out.shape), f"{self.shape} and {other.shape} do not give {out.shape}"
    )


# ---- self + alpha * other -----------------------------------------------------------------------------------------


@operator("Add", check=check_binary)
def add(self: Tensor, other: Tensor, alpha: Scalar, out: Tensor) -> None:
    out.copy_(torch.add(self, other, alpha=alpha))


@operator("Adds")
def adds(self: Tensor, other: Scalar, alpha: Scalar, out: Tensor) -> None:
    out.copy_(torch.add(self, other, alpha=alpha))


@operator("InplaceAdd", check=check_binary)
def inplace_add(self: Tensor, other: Tensor, alpha: Scalar) -> None:
    self.copy_(torch.add(self, other, alpha=alpha))


@operator("InplaceAdds")
def inplace_adds(self: Tensor, other: Scalar, alpha: Scalar) -> None:
    self.copy_(torch.add(self, other, alpha=alpha))


@operator("Sub", check=check_binary)
def sub(self: Tensor, other: Tensor, alpha: Scalar, out: Tensor) -> None:
    out.copy_(torch.sub(self, other, alpha=alpha))


@operator("Subs")
def subs(self: Tensor, other: Scalar, alpha: Scalar, out: Tensor) -> None:
    out.copy_(torch.sub(self, other, alpha=alpha))


@operator("InplaceSub", check=check_binary)
def inplace_sub(self: Tensor, other: Tensor, alpha: Scalar) -> None:
    self.copy_(torch.sub(self, other, alpha=alpha))


@operator("InplaceSubs")
def inplace_subs(self: Tensor, other: Scalar, alpha: Scalar) -> None:
    self.copy_(torch.sub(self, other, alpha=alpha))


@operator("Rsub", check=check_binary)
def rsub(self: Tensor, other: Tensor, alpha: Scalar, out: Tensor) -> None:
    out.copy_(torch.rsub(self, other, alpha=alpha))


@operator("Rsubs")
def rsubs(self: Tensor, other: Scalar, alpha: Scalar, out: Tensor) -> None:
    out.copy_(torch.rsub(self, other, alpha=alpha))


# ---- two operands, one result -------------------------------------------------------------------------------------


def _tensor_tensor(name: str, compute: object) -> None:
    def run(self: Tensor, other: Tensor, out: Tensor) -> None:
        out.copy_(compute(self, other))

    def run_inplace(self: Tensor, other: Tensor) -> None:
        self.copy_(compute(self, other))

    operator(name, check=check_binary)(run)
    operator("Inplace" + name, check=check_binary)(run_inplace)


def _tensor_scalar(name: str, compute: object) -> None:
    def run(self: Tensor, other: Scalar, out: Tensor) -> None:
        out.copy_(compute(self, other))

    def run_inplace(self: Tensor, other: Scalar) -> None:
        self.copy_(compute(self, other))

    operator(name)(run)
    operator("Inplace" + name)(run_inplace)


for _name, _compute in {
    "Mul": torch.mul,
    "Div": torch.div,
    "Maximum": torch.maximum,
    "Minimum": torch.minimum,
    "FloorDivide": torch.floor_divide,
    "PowTensorTensor": torch.pow,
    "RemainderTensorTensor": torch.remainder,
    "FmodTensor": torch.fmod,
    "BitwiseAndTensor": torch.bitwise_and,
    "BitwiseOrTensor": torch.bitwise_or,
    "BitwiseXorTensor": torch.bitwise_xor,
    "LogicalAnd": torch.logical_and,
    "LogicalOr": torch.logical_or,
    "LogicalXor": torch.logical_xor,
    "EqTensor": torch.eq,
    "NeTensor": torch.ne,
    "LtTensor": torch.lt,
    "LeTensor": torch.le,
    "GtTensor": torch.gt,
    "GeTensor": torch.ge,
    "LeftShift": torch.bitwise_left_shift,
    "RightShift": torch.bitwise_right_shift,
    "ClampMinTensor": torch.maximum,
    "ClampMaxTensor": torch.minimum,
}.items():
    _tensor_tensor(_name, _compute)

for _name, _compute in {
    "Muls": torch.mul,
    "Divs": torch.div,
    "FloorDivides": torch.floor_divide,
    "PowTensorScalar": torch.pow,
    "RemainderTensorScalar": torch.remainder,
    "FmodScalar": torch.fmod,
    "BitwiseAndScalar": torch.bitwise_and,
    "BitwiseOrScalar": torch.bitwise_or,
    "BitwiseXorScalar": torch.bitwise_xor,
    "LeftShifts": torch.bitwise_left_shift,
    "RightShifts": torch.bitwise_right_shift,
    "EqScalar": torch.eq,
    "NeScalar": torch.ne,
    "LtScalar": torch.lt,
    "LeScalar": torch.le,
    "GtScalar": torch.gt,
    "GeScalar": torch.ge,
}.items():
    _tensor_scalar(_name, _compute)

_ROUNDING = {0: None, 1: "trunc", 2: "floor"}


@operator("DivMod", check=check_binary)
def div_mod(self: Tensor, other: Tensor, mode: int32, out: Tensor) -> None:
    out.copy_(torch.div(self, other, rounding_mode=_ROUNDING[mode]))


@operator("DivMods")
def div_mods(self: Tensor, other: Scalar, mode: int32, out: Tensor) -> None:
    out.copy_(torch.div(self, other, rounding_mode=_ROUNDING[mode]))


@operator("InplaceDivMod", check=check_binary)
def inplace_div_mod(self: Tensor, other: Tensor, mode: int32) -> None:
    self.copy_(torch.div(self, other, rounding_mode=_ROUNDING[mode]))


@operator("InplaceDivMods")
def inplace_div_mods(self: Tensor, other: Scalar, mode: int32) -> None:
    self.copy_(torch.div(self, other, rounding_mode=_ROUNDING[mode]))


@operator("PowScalarTensor")
def pow_scalar_tensor(self: Scalar, exponent: Tensor, out: Tensor) -> None:
    out.copy_(torch.pow(self, exponent))


@operator("RemainderScalarTensor")
def remainder_scalar_tensor(self: Scalar, other: Tensor, out: Tensor) -> None:
    out.copy_(torch.remainder(self, other))


# ---- one operand --------------------------------------------------------------------------------------------------


def _unary(name: str, compute: object) -> None:
    def run(self: Tensor, out: Tensor) -> None:
        out.copy_(compute(self))

    def run_inplace(self: Tensor) -> None:
        self.copy_(compute(self))

    operator(name)(run)
    operator("Inplace" + name)(run_inplace)


for _name, _compute in {
    "Abs": torch.abs,
    "Neg": torch.neg,
    "Exp": torch.exp,
    "Exp2": torch.exp2,
    "Expm1": torch.expm1,
    "Log": torch.log,
    "Log2": torch.log2,
    "Log10": torch.log10,
    "Log1p": torch.log1p,
    "Sqrt": torch.sqrt,
    "Rsqrt": torch.rsqrt,
    "Reciprocal": torch.reciprocal,
    "Sigmoid": torch.sigmoid,
    "Silu": torch.nn.functional.silu,
    "Relu": torch.relu,
    "Tanh": torch.tanh,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Erf": torch.erf,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Round": torch.round,
    "Trunc": torch.trunc,
    "Sign": torch.sign,
    "BitwiseNot": torch.bitwise_not,
    "LogicalNot": torch.logical_not,
    "IsFinite": torch.isfinite,
    "IsPosInf": torch.isposinf,
    "IsNegInf": torch.isneginf,
}.items():
    _unary(_name, _compute)


@operator("Gelu")
def gelu(self: Tensor, out: Tensor) -> None:
    out.copy_(torch.nn.functional.gelu(self, approximate="tanh"))


@operator("GeluV2")
def gelu_v2(self: Tensor, approximate: int, out: Tensor) -> None:
    out.copy_(torch.nn.functional.gelu(self, approximate=("none", "tanh")[approximate]))


@operator("Clamp")
def clamp(self: Tensor, low: Scalar | None, high: Scalar | None, out: Tensor) -> None:
    out.copy_(torch.clamp(self, low, high))


@operator("ClampMin")
def clamp_min(self: Tensor, low: Scalar, out: Tensor) -> None:
    out.copy_(torch.clamp_min(self, low))


@operator("ClampMax")
def clamp_max(self: Tensor, high: Scalar, out: Tensor) -> None:
    out.copy_(torch.clamp_max(self, high))


@operator("InplaceClampMax")
def inplace_clamp_max(self: Tensor, high: Scalar) -> None:
    self.clamp_max_(high)


@operator("NanToNum")
def nan_to_num(self: Tensor, nan: float32, posinf: float32, neginf: float32, out: Tensor) -> None:
    out.copy_(torch.nan_to_num(self, nan, posinf, neginf))


@operator("SWhere")
def where(condition: Tensor, self: Tensor, other: Tensor, out: Tensor) -> None:
    out.copy_(torch.where(condition.bool(), self, other))


@operator("Addcmul")
def addcmul(self: Tensor, first: Tensor, second: Tensor, value: Scalar, out: Tensor) -> None:
    out.copy_(torch.addcmul(self, first, second, value=value))


@operator("Lerp")
def lerp(self: Tensor, end: Tensor, weight: Tensor, out: Tensor) -> None:
    out.copy_(torch.lerp(self, end, weight))


@operator("Lerps")
def lerps(self: Tensor, end: Tensor, weight: Scalar, out: Tensor) -> None:
    out.copy_(torch.lerp(self, end, weight))


def _check_swiglu(x: Tensor, dim: int, out: Tensor) -> None:
    require(x.shape[dim] % 2 == 0, f"dimension {dim} of {tuple(x.shape)} must be even")
    expected = list(x.shape)
    expected[dim] //= 2
    require(list(out.shape) == expected, f"the output must be {expected}, not {list(out.shape)}")


@operator("SwiGlu", check=_check_swiglu)
def swiglu(x: Tensor, dim: int, out: Tensor) -> None:
    gate, up = (half.float() for half in x.chunk(2, dim))
    out.copy_(gate / (1 + torch.exp(-gate)) * up)
