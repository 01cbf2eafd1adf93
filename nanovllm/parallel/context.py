"""Tensor parallelism as a layer sees it: a rank, a world size, two collectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ParallelContext:
    """The tensor-parallel group of one rank. The default is the whole model on one rank.

    Attributes:
        rank: this rank, 0 <= rank < world.
        world: number of ranks a model's matrices are split over.
        group: the torch.distributed process group; None stands for the default group.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of ``x`` over the ranks, in place; the same on every rank."""
        if self.world > 1:
            torch.distributed.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """The ranks' ``x`` [..., n] side by side: [..., world * n], the same on every rank."""
        if self.world == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world)]
        torch.distributed.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)
