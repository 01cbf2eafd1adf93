"""Norms over the last dimension, in float32, rounded once."""

from __future__ import annotations

import torch

from .decode import Ints, Tensor
from .registry import IS_310P, SOC, operator, require


def _check_norm(x: Tensor, gamma: Tensor) -> None:
    require(x.dtype in (torch.float16, torch.bfloat16, torch.float32), f"x is {x.dtype}")
    require(x.shape[-gamma.dim() :] == gamma.shape, f"gamma {tuple(gamma.shape)} for x {tuple(x.shape)}")
    if IS_310P:
        require(x.dtype != torch.bfloat16, f"{SOC} has no bfloat16")
        require(x.shape[-1] * x.element_size() >= 32, f"{SOC}: the last dimension must hold 32 bytes")


def _normalized(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    dims = list(range(-gamma.dim(), 0))
    rstd = 1 / torch.sqrt((x * x).mean(dims, keepdim=True) + epsilon)
    return x * rstd * gamma, rstd


def _check_rms(x: Tensor, gamma: Tensor, epsilon: float, y: Tensor, rstd: Tensor) -> None:
    _check_norm(x, gamma)
    mixed = gamma.dtype == torch.float32 and not IS_310P
    require(gamma.dtype == x.dtype or mixed, f"gamma is {gamma.dtype}, x {x.dtype}")


@operator("RmsNorm", check=_check_rms)
def rms_norm(x: Tensor, gamma: Tensor, epsilon: float, y: Tensor, rstd: Tensor) -> None:
    result, scale = _normalized(x.float(), gamma.float(), epsilon)
    y.copy_(result), rstd.copy_(scale.view(rstd.shape))


def _check_gemma(x: Tensor, gamma: Tensor, epsilon: float, y: Tensor, rstd: Tensor) -> None:
    require(not IS_310P, f"the operator does not exist on {SOC}")
    _check_rms(x, gamma, epsilon, y, rstd)


@operator("GemmaRmsNorm", check=_check_gemma)
def gemma_rms_norm(x: Tensor, gamma: Tensor, epsilon: float, y: Tensor, rstd: Tensor) -> None:
    result, scale = _normalized(x.float(), 1 + gamma.float(), epsilon)
    y.copy_(result), rstd.copy_(scale.view(rstd.shape))


def _check_add(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float, y: Tensor, rstd: Tensor, x: Tensor) -> None:
    _check_norm(x1, gamma)
    require(x1.shape == x2.shape, f"x1 {tuple(x1.shape)} and x2 {tuple(x2.shape)}")
    require(x1.dtype == x2.dtype == gamma.dtype, f"x1 {x1.dtype}, x2 {x2.dtype} and gamma {gamma.dtype} must be equal")


@operator("AddRmsNorm", check=_check_add)
def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float, y: Tensor, rstd: Tensor, x: Tensor) -> None:
    total = (x1.float() + x2.float()).to(x.dtype)
    result, scale = _normalized(total.float(), gamma.float(), epsilon)
    x.copy_(total), y.copy_(result)
    if not IS_310P:  # there the output is not valid
        rstd.copy_(scale.view(rstd.shape))


@operator("LayerNorm")
def layer_norm(
    x: Tensor, shape: Ints, weight: Tensor | None, bias: Tensor | None, epsilon: float, y: Tensor, mean: Tensor,
    rstd: Tensor,
) -> None:  # fmt: skip
    dims = list(range(-len(shape), 0))
    x32 = x.float()
    average = x32.mean(dims, keepdim=True)
    scale = 1 / torch.sqrt((x32 - average).square().mean(dims, keepdim=True) + epsilon)
    result = (x32 - average) * scale
    if weight is not None:
        result = result * weight.float()
    if bias is not None:
        result = result + bias.float()
    y.copy_(result), mean.copy_(average.view(mean.shape)), rstd.copy_(scale.view(rstd.shape))
