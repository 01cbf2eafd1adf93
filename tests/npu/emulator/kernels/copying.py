"""Filling, copying, casting, joining and rearranging."""

from __future__ import annotations

import torch

from .decode import Ints, Scalar, Tensor, Tensors, dtype
from .registry import operator, require


def _check_cast(self: Tensor, kind: dtype, out: Tensor) -> None:
    require(out.dtype == kind, f"asked for {kind}, the output is {out.dtype}")
    require(self.shape == out.shape, f"{self.shape} into {out.shape}")


@operator("Cast", check=_check_cast)
def cast(self: Tensor, kind: dtype, out: Tensor) -> None:
    out.copy_(self)


def _check_copy(self: Tensor, source: Tensor) -> None:
    require(torch.broadcast_shapes(self.shape, source.shape) == self.shape, f"{source.shape} into {self.shape}")


@operator("InplaceCopy", check=_check_copy)
def inplace_copy(self: Tensor, source: Tensor) -> None:
    self.copy_(source)


@operator("ForeachCopy")
def foreach_copy(sources: Tensors, targets: Tensors) -> None:
    require(len(sources) == len(targets), f"{len(sources)} tensors into {len(targets)}")
    for source, target in zip(sources, targets, strict=True):
        require(source.shape == target.shape, f"{tuple(source.shape)} into {tuple(target.shape)}")
        target.copy_(source)


@operator("InplaceZero")
def inplace_zero(self: Tensor) -> None:
    self.zero_()


@operator("InplaceOne")
def inplace_one(self: Tensor) -> None:
    self.fill_(1)


@operator("InplaceFillScalar")
def inplace_fill_scalar(self: Tensor, value: Scalar) -> None:
    self.fill_(value)


@operator("InplaceFillTensor")
def inplace_fill_tensor(self: Tensor, value: Tensor) -> None:
    require(value.numel() == 1, f"the value must have one element, not {tuple(value.shape)}")
    self.copy_(value.reshape(()))


@operator("Arange", "Range")
def arange(start: Scalar, end: Scalar, step: Scalar, out: Tensor) -> None:
    steps = torch.arange(out.numel(), dtype=torch.float64 if out.dtype.is_floating_point else torch.int64, device="cpu")
    out.copy_((start + steps * step).view(out.shape))


@operator("Linspace")
def linspace(start: Scalar, end: Scalar, steps: int, out: Tensor) -> None:
    out.copy_(torch.linspace(start, end, steps, dtype=torch.float32, device="cpu"))


@operator("Eye")
def eye(rows: int, columns: int, out: Tensor) -> None:
    out.copy_(torch.eye(rows, columns, device="cpu"))


@operator("Cat")
def cat(tensors: Tensors, dim: int, out: Tensor) -> None:
    out.copy_(torch.cat(tensors, dim))


@operator("Stack")
def stack(tensors: Tensors, dim: int, out: Tensor) -> None:
    out.copy_(torch.stack(tensors, dim))


@operator("SplitWithSize")
def split(self: Tensor, sizes: Ints, dim: int, outs: Tensors) -> None:
    for out, part in zip(outs, self.split(sizes, dim), strict=True):
        out.copy_(part)


@operator("Repeat")
def repeat(self: Tensor, repeats: Ints, out: Tensor) -> None:
    out.copy_(self.repeat(repeats))


@operator("RepeatInterleaveInt")
def repeat_interleave_int(self: Tensor, repeats: int, size: int, out: Tensor) -> None:
    out.copy_(self.repeat_interleave(repeats))


@operator("RepeatInterleaveIntWithDim")
def repeat_interleave_int_dim(self: Tensor, repeats: int, dim: int, size: int, out: Tensor) -> None:
    out.copy_(self.repeat_interleave(repeats, dim))


@operator("RepeatInterleave")
def repeat_interleave(self: Tensor, repeats: Tensor, size: int, out: Tensor) -> None:
    out.copy_(self.repeat_interleave(repeats))


@operator("RepeatInterleaveWithDim")
def repeat_interleave_dim(self: Tensor, repeats: Tensor, dim: int, size: int, out: Tensor) -> None:
    out.copy_(self.repeat_interleave(repeats, dim))


@operator("Roll")
def roll(self: Tensor, shifts: Ints, dims: Ints, out: Tensor) -> None:
    out.copy_(self.roll(shifts, dims or None))


@operator("Flip")
def flip(self: Tensor, dims: Ints, out: Tensor) -> None:
    out.copy_(self.flip(dims))


@operator("Tril")
def tril(self: Tensor, diagonal: int, out: Tensor) -> None:
    out.copy_(self.tril(diagonal))


@operator("Triu")
def triu(self: Tensor, diagonal: int, out: Tensor) -> None:
    out.copy_(self.triu(diagonal))


@operator("InplaceTriu")
def inplace_triu(self: Tensor, diagonal: int) -> None:
    self.copy_(self.triu(diagonal))


@operator("InplaceTril")
def inplace_tril(self: Tensor, diagonal: int) -> None:
    self.copy_(self.tril(diagonal))


@operator("ConstantPadNd")
def constant_pad(self: Tensor, padding: Ints, value: Scalar, out: Tensor) -> None:
    out.copy_(torch.nn.functional.pad(self, padding, value=value))


@operator("OneHot")
def one_hot(self: Tensor, classes: int, on: Tensor, off: Tensor, axis: int, out: Tensor) -> None:
    hot = torch.arange(classes, device="cpu") == self.unsqueeze(-1)
    out.copy_(torch.where(hot, on.reshape(()), off.reshape(())))
