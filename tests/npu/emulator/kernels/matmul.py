"""Matrix products: operands in their dtype, sums in float32, as the cube units do."""

from __future__ import annotations

import torch

from .decode import Scalar, Tensor, int8
from .registry import IS_310P, SOC, operator, require


def _product(self: Tensor, other: Tensor) -> Tensor:
    require(self.dtype == other.dtype, f"matmul of {self.dtype} and {other.dtype}")
    if self.dtype in (torch.float16, torch.bfloat16):
        return torch.matmul(self.float(), other.float())
    return torch.matmul(self, other)


def _check_matmul(self: Tensor, other: Tensor, out: Tensor, cube_math: int = 0) -> None:
    require(self.shape[-1] == other.shape[-2 if other.dim() > 1 else 0], f"matmul of {self.shape} and {other.shape}")


@operator("Matmul", "Mm", "BatchMatMul", check=_check_matmul)
def matmul(self: Tensor, other: Tensor, out: Tensor, cube_math: int8) -> None:
    out.copy_(_product(self, other))


@operator("Mv")
def mv(self: Tensor, vector: Tensor, out: Tensor, cube_math: int8) -> None:
    out.copy_(_product(self, vector))


@operator("Dot")
def dot(self: Tensor, other: Tensor, out: Tensor) -> None:
    out.copy_(_product(self, other))


@operator("Addmm")
def addmm(self: Tensor, a: Tensor, b: Tensor, beta: Scalar, alpha: Scalar, out: Tensor, cube_math: int8) -> None:
    out.copy_(beta * self.float() + alpha * _product(a, b).float())


@operator("Baddbmm")
def baddbmm(self: Tensor, a: Tensor, b: Tensor, beta: Scalar, alpha: Scalar, out: Tensor, cube_math: int8) -> None:
    out.copy_(beta * self.float() + alpha * _product(a, b).float())


_LONGEST = 65535  # rows and columns of a weight that is an integer times a scale


def _check_quantised_weight(
    x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, quant_scale: Tensor | None,
    quant_offset: Tensor | None, bias: Tensor | None, group: int, y: Tensor,
) -> None:  # fmt: skip
    require(quant_scale is None and quant_offset is None, "results in 8 bits are not emulated")
    require(offset is None, "offsets are not emulated")
    require(group == 0, "antiquant_group_size is not emulated")
    require(x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not IS_310P), f"{SOC}: x is {x.dtype}")
    require(weight.dtype == torch.int8, f"weight is {weight.dtype}; only int8 is emulated")
    require(scale.dtype == x.dtype, f"antiquant_scale is {scale.dtype}, x {x.dtype}")
    require(
        x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[0], f"x {tuple(x.shape)}, {tuple(weight.shape)}"
    )
    require(x.numel() > 0 and weight.numel() > 0, "empty tensors are not supported")
    require(max(weight.shape) <= _LONGEST, f"weight {tuple(weight.shape)}: at most {_LONGEST} rows and columns")
    columns = weight.shape[1]
    require(tuple(scale.shape) in ((1,), (1, 1), (columns,), (1, columns)), f"antiquant_scale {tuple(scale.shape)}")
    if bias is not None:
        wanted = torch.float32 if x.dtype == torch.bfloat16 else torch.float16
        require(bias.dtype == wanted, f"bias is {bias.dtype}; for x of {x.dtype} it must be {wanted}")


@operator("WeightQuantBatchMatmulV2", check=_check_quantised_weight)
def weight_quant_batch_matmul(
    x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, quant_scale: Tensor | None,
    quant_offset: Tensor | None, bias: Tensor | None, group: int, y: Tensor,
) -> None:  # fmt: skip
    product = x.float() @ (weight.float() * scale.float().reshape(1, -1))
    y.copy_(product if bias is None else product + bias.float())
