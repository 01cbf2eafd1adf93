"""Random numbers, a function of the seed and offset that torch_npu's generator hands over.

Which numbers come out for a seed is not what a real device gives; that equal seeds give equal numbers is.
"""

from __future__ import annotations

import torch

from .decode import Tensor, float32, uint64
from .registry import operator


def _generator(seed: int, offset: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed((seed * 0x9E3779B1 + offset) % 2**63)


@operator("InplaceUniform")
def uniform(self: Tensor, low: float, high: float, seed: uint64, offset: uint64) -> None:
    self.copy_(
        torch.empty(self.shape, dtype=torch.float32, device="cpu").uniform_(
            low, high, generator=_generator(seed, offset)
        )
    )


@operator("InplaceNormal")
def normal(self: Tensor, mean: float32, deviation: float32, seed: int, offset: int) -> None:
    noise = torch.empty(self.shape, dtype=torch.float32, device="cpu")
    self.copy_(noise.normal_(mean, deviation, generator=_generator(seed, offset)))


@operator("InplaceRandom")
def random(self: Tensor, low: int, high: int, seed: int, offset: int) -> None:
    self.copy_(
        torch.empty(self.shape, dtype=torch.int64, device="cpu").random_(low, high, generator=_generator(seed, offset))
    )


@operator("SimThreadExponential")
def exponential(self: Tensor, count: int, rate: float32, seed: int, offset: int) -> None:
    noise = torch.empty(self.shape, dtype=torch.float32, device="cpu")
    self.copy_(noise.exponential_(rate, generator=_generator(seed, offset)))


@operator("Multinomial")
def multinomial(self: Tensor, samples: int, replacement: bool, seed: int, offset: int, out: Tensor) -> None:
    out.copy_(torch.multinomial(self.float(), samples, replacement, generator=_generator(seed, offset)))


@operator("Randperm")
def randperm(count: int, seed: int, offset: int, out: Tensor) -> None:
    out.copy_(torch.randperm(count, generator=_generator(seed, offset)))
