"""Matrix products: operands in their dtype, sums in float32, as the cube units do."""

from __future__ import annotations

import torch

from .decode import Scalar, Tensor, int8
from .registry import operator, require


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
