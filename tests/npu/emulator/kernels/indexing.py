"""Reading and writing by index. An index out of range is the device's address fault, reported as an error."""

from __future__ import annotations

import torch

from .decode import Scalar, Tensor, Tensors
from .registry import operator, require


def _in_range(index: Tensor, size: int) -> Tensor:
    index = index.long()
    if index.numel():
        low, high = int(index.min()), int(index.max())
        require(-size <= low and high < size, f"index {low if low < -size else high} is out of range for {size} rows")
    return torch.where(index < 0, index + size, index)


@operator("Embedding")
def embedding(weight: Tensor, indices: Tensor, out: Tensor) -> None:
    out.copy_(weight[_in_range(indices, weight.shape[0])])


@operator("IndexSelect")
def index_select(self: Tensor, dim: int, index: Tensor, out: Tensor) -> None:
    out.copy_(self.index_select(dim, _in_range(index, self.shape[dim]).reshape(-1)))


@operator("Gather")
def gather(self: Tensor, dim: int, index: Tensor, out: Tensor) -> None:
    out.copy_(self.gather(dim, _in_range(index, self.shape[dim])))


def _indices(self: Tensor, indices: list[Tensor | None]) -> tuple:
    """Undefined tensors stand for whole dimensions, given as tensors without elements in a list."""
    result: list = []
    dim = 0
    for index in indices:
        if index is None or (index.numel() == 0 and index.dim() == 1 and _stands_for_all(indices)):
            result.append(slice(None))
            dim += 1
        elif index.dtype is torch.bool:
            result.append(index)
            dim += index.dim()
        else:
            result.append(_in_range(index, self.shape[dim]))
            dim += 1
    return tuple(result)


def _stands_for_all(indices: list[Tensor | None]) -> bool:
    return any(index is not None and index.numel() for index in indices)


@operator("Index")
def index(self: Tensor, indices: Tensors, out: Tensor) -> None:
    out.copy_(self[_indices(self, indices)])


@operator("IndexPutImpl")
def index_put(self: Tensor, indices: Tensors, values: Tensor, accumulate: bool, unsafe: bool) -> None:
    where = _indices(self, indices)
    if accumulate:
        torch.ops.aten.index_put_(self, [None if isinstance(i, slice) else i for i in where], values, True)
    else:
        self[where] = values.to(self.dtype)


@operator("Scatter")
def scatter(self: Tensor, dim: int, index: Tensor, source: Tensor, reduce: int, out: Tensor) -> None:
    result = self.clone()
    _scatter(result, dim, index, source, reduce)
    out.copy_(result)


@operator("InplaceScatter")
def inplace_scatter(self: Tensor, dim: int, index: Tensor, source: Tensor, reduce: int) -> None:
    _scatter(self, dim, index, source, reduce)


def _scatter(into: Tensor, dim: int, index: Tensor, source: Tensor, reduce: int) -> None:
    index = _in_range(index, into.shape[dim])
    if reduce == 0:
        into.scatter_(dim, index, source)
    else:
        into.scatter_reduce_(dim, index, source, ("", "sum", "prod")[reduce])


@operator("ScatterValue")
def scatter_value(self: Tensor, dim: int, index: Tensor, value: Scalar, reduce: int, out: Tensor) -> None:
    require(reduce == 0, "a reduction is not emulated")
    out.copy_(self.scatter(dim, _in_range(index, self.shape[dim]), value))


@operator("InplaceScatterValue")
def inplace_scatter_value(self: Tensor, dim: int, index: Tensor, value: Scalar, reduce: int) -> None:
    require(reduce == 0, "a reduction is not emulated")
    self.scatter_(dim, _in_range(index, self.shape[dim]), value)


@operator("ScatterAdd")
def scatter_add(self: Tensor, dim: int, index: Tensor, source: Tensor, out: Tensor) -> None:
    out.copy_(self.scatter_add(dim, _in_range(index, self.shape[dim]), source))


@operator("InplaceIndexCopy")
def inplace_index_copy(self: Tensor, dim: int, index: Tensor, source: Tensor) -> None:
    self.index_copy_(dim, _in_range(index, self.shape[dim]), source)


@operator("IndexCopy")
def index_copy(self: Tensor, dim: int, index: Tensor, source: Tensor, out: Tensor) -> None:
    out.copy_(self.index_copy(dim, _in_range(index, self.shape[dim]), source))


@operator("IndexAdd")
def index_add(self: Tensor, dim: int, index: Tensor, source: Tensor, alpha: Scalar, out: Tensor) -> None:
    out.copy_(self.index_add(dim, _in_range(index, self.shape[dim]), source, alpha=alpha))


@operator("InplaceMaskedFillScalar")
def masked_fill_scalar(self: Tensor, mask: Tensor, value: Scalar) -> None:
    self.masked_fill_(mask.bool(), value)


@operator("InplaceMaskedFillTensor")
def masked_fill_tensor(self: Tensor, mask: Tensor, value: Tensor) -> None:
    self.masked_fill_(mask.bool(), value.reshape(()))


@operator("InplaceMaskedScatter")
def masked_scatter(self: Tensor, mask: Tensor, source: Tensor) -> None:
    self.masked_scatter_(mask.bool(), source)
