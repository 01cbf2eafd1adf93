"""Where weights live: empty parameters, and the slots through which a checkpoint fills them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nanovllm.ops import Operators
from nanovllm.parallel import ParallelContext


@dataclass(frozen=True)
class LayerContext:
    """What every layer is built with: number format, device, operators, and this rank's place among its peers."""

    dtype: torch.dtype
    device: str
    ops: Operators
    parallel: ParallelContext

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised parameter."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def empty_matrix(self, rows: int, columns: int) -> Tensor:
        """An uninitialised parameter that ``ops.pack_linear`` will take: it may be packed where it lies."""
        allocate = self.ops.allocate_matrix
        return self.empty(rows, columns) if allocate is None else allocate(rows, columns, self.dtype)


class Layer(Protocol):
    """What has something to do once its weights are in."""

    def finish(self) -> None: ...


@dataclass(frozen=True)
class WeightSlot:
    """The place of one checkpoint tensor among this rank's parameters.

    ``target``, a view into a (possibly fused) parameter, takes ``checkpoint[start : start + target.shape[dim]]`` along
    ``dim``. ``layer`` is to be finished when all its slots are filled.
    """

    target: Tensor
    shape: tuple[int, ...]  # of the whole tensor in the checkpoint
    dim: int = 0
    start: int = 0
    layer: Layer | None = None

    @property
    def whole(self) -> bool:
        """Whether this rank takes the checkpoint tensor as it is."""
        return self.shape == tuple(self.target.shape)


Slots = dict[str, WeightSlot]  # name in the checkpoint -> slot
