"""Sums, extrema, sorting and softmax along dimensions."""

from __future__ import annotations

import torch

from .decode import Ints, Scalar, Tensor, dtype, set_view_shape
from .registry import operator, require


def _dims(self: Tensor, dims: list[int] | None) -> list[int]:
    return dims or list(range(self.dim()))


@operator("ReduceSum")
def reduce_sum(self: Tensor, dims: Ints | None, keep: bool, kind: dtype, out: Tensor) -> None:
    out.copy_(self.sum(_dims(self, dims), keep, dtype=kind).view(out.shape))


@operator("Mean")
def mean(self: Tensor, dims: Ints | None, keep: bool, kind: dtype, out: Tensor) -> None:
    out.copy_(self.to(kind).mean(_dims(self, dims), keep).view(out.shape))


@operator("Prod")
def prod(self: Tensor, kind: dtype, out: Tensor) -> None:
    out.copy_(self.prod(dtype=kind))


@operator("All")
def all_(self: Tensor, dims: Ints | None, keep: bool, out: Tensor) -> None:
    out.copy_(self.bool().all(dim=_dims(self, dims), keepdim=keep).view(out.shape) if self.dim() else self.bool())


@operator("Any")
def any_(self: Tensor, dims: Ints | None, keep: bool, out: Tensor) -> None:
    out.copy_(self.bool().any(dim=_dims(self, dims), keepdim=keep).view(out.shape) if self.dim() else self.bool())


@operator("Max")
def max_(self: Tensor, out: Tensor) -> None:
    out.copy_(self.max())


@operator("Min")
def min_(self: Tensor, out: Tensor) -> None:
    out.copy_(self.min())


@operator("MaxDim")
def max_dim(self: Tensor, dim: int, keep: bool, out: Tensor, indices: Tensor) -> None:
    values, where = self.max(dim, keep)
    out.copy_(values), indices.copy_(where)


@operator("MinDim")
def min_dim(self: Tensor, dim: int, keep: bool, out: Tensor, indices: Tensor) -> None:
    values, where = self.min(dim, keep)
    out.copy_(values), indices.copy_(where)


@operator("Amax")
def amax(self: Tensor, dims: Ints | None, keep: bool, out: Tensor) -> None:
    out.copy_(self.amax(_dims(self, dims), keep).view(out.shape))


@operator("Amin")
def amin(self: Tensor, dims: Ints | None, keep: bool, out: Tensor) -> None:
    out.copy_(self.amin(_dims(self, dims), keep).view(out.shape))


@operator("ArgMax")
def argmax(self: Tensor, dim: int, keep: bool, out: Tensor) -> None:
    out.copy_(self.argmax(dim, keep))


@operator("ArgMin")
def argmin(self: Tensor, dim: int, keep: bool, out: Tensor) -> None:
    out.copy_(self.argmin(dim, keep))


@operator("Cumsum")
def cumsum(self: Tensor, dim: int, kind: dtype, out: Tensor) -> None:
    out.copy_(self.cumsum(dim, dtype=kind))


@operator("Softmax")
def softmax(self: Tensor, dim: int, out: Tensor) -> None:
    require(self.dtype.is_floating_point, f"softmax of {self.dtype}")
    out.copy_(self.float().softmax(dim))


@operator("LogSoftmax")
def log_softmax(self: Tensor, dim: int, out: Tensor) -> None:
    out.copy_(self.float().log_softmax(dim))


@operator("LogSumExp")
def logsumexp(self: Tensor, dims: Ints | None, keep: bool, out: Tensor) -> None:
    out.copy_(self.float().logsumexp(_dims(self, dims), keep).view(out.shape))


@operator("Topk")
def topk(self: Tensor, k: int, dim: int, largest: bool, sort: bool, values: Tensor, indices: Tensor) -> None:
    found, where = self.topk(k, dim, largest, True)
    values.copy_(found), indices.copy_(where)


@operator("TopkV2")
def topk_v2(
    self: Tensor, k: int, dim: int, largest: bool, sort: bool, stable: bool, values: Tensor, indices: Tensor
) -> None:
    topk(self, k, dim, largest, sort, values, indices)


@operator("Sort")
def sort(self: Tensor, stable: bool, dim: int, descending: bool, values: Tensor, indices: Tensor) -> None:
    found, where = self.sort(stable=True, dim=dim, descending=descending)
    values.copy_(found), indices.copy_(where)


@operator("Equal")
def equal(self: Tensor, other: Tensor, out: Tensor) -> None:
    out.copy_(torch.tensor(torch.equal(self, other), device="cpu"))


@operator("LinalgVectorNorm")
def vector_norm(self: Tensor, order: Scalar, dims: Ints | None, keep: bool, kind: dtype, out: Tensor) -> None:
    out.copy_(torch.linalg.vector_norm(self, order, _dims(self, dims), keep, dtype=kind).view(out.shape))


@operator("VarCorrection")
def variance(self: Tensor, dims: Ints | None, correction: int, keep: bool, out: Tensor) -> None:
    out.copy_(self.var(_dims(self, dims), correction=correction, keepdim=keep).view(out.shape))


@operator("Nonzero")
def nonzero(self: Tensor, out: Tensor) -> None:
    found = self.nonzero()
    out[: len(found)].copy_(found)
    set_view_shape(out, found.shape)


@operator("NonzeroV2")
def nonzero_v2(self: Tensor, out: Tensor) -> None:
    found = self.nonzero().T
    out.reshape(-1)[: found.numel()].copy_(found.reshape(-1))
    set_view_shape(out, found.shape)


@operator("Unique2")
def unique2(
    self: Tensor, sort: bool, with_inverse: bool, with_counts: bool, values: Tensor, inverse: Tensor, counts: Tensor
) -> None:
    found, where, count = torch.unique(self, sorted=True, return_inverse=True, return_counts=True)
    values.reshape(-1)[: found.numel()].copy_(found)
    set_view_shape(values, found.shape)
    if with_inverse or with_counts:
        inverse.copy_(where)
    if with_counts:
        counts.reshape(-1)[: found.numel()].copy_(count)
        set_view_shape(counts, count.shape)


@operator("Bincount")
def bincount(self: Tensor, weights: Tensor | None, minimum: int, out: Tensor) -> None:
    out.copy_(torch.bincount(self, weights, minimum))


@operator("SearchSorted")
def searchsorted(
    sequence: Tensor, self: Tensor, int32_out: bool, right: bool, sorter: Tensor | None, out: Tensor
) -> None:
    out.copy_(torch.searchsorted(sequence, self, right=right, sorter=sorter))
