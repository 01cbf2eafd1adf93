"""Rotary position embeddings. Cosines and sines come for the whole head dimension, the halves repeated."""

from __future__ import annotations

import torch

from .decode import Ints, Tensor
from .registry import IS_310P, SOC, operator, require


def _half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _interleaved(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def _check_embedding(x: Tensor, cos: Tensor, sin: Tensor, mode: int, rotate: Tensor | None, out: Tensor) -> None:
    require(not IS_310P, f"the operator does not exist on {SOC}")
    require(mode in (0, 1), f"rotary mode {mode} is not emulated")
    require(rotate is None, "a rotation matrix is not emulated")
    require(x.dim() in (3, 4), f"x must have 4 dimensions (or 3), not {tuple(x.shape)}")
    require(x.shape[-1] % 2 == 0 and x.shape[-1] < 896, f"head_dim {x.shape[-1]} must be even and below 896")
    require(
        x.dim() == 3 or (x.shape[0] < 1000 and x.shape[2] < 1000), f"batch and heads must stay below 1000: {x.shape}"
    )
    require(cos.shape == sin.shape, f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)}")
    require(cos.dim() == x.dim() and cos.shape[-1] == x.shape[-1], f"cos {tuple(cos.shape)} for x {tuple(x.shape)}")
    require(
        all(c in (1, n) for c, n in zip(cos.shape, x.shape, strict=True)), f"cos {cos.shape} does not fit {x.shape}"
    )
    require(cos.numel() < x.numel() or x.shape == cos.shape, f"cos {tuple(cos.shape)} for x {tuple(x.shape)}")
    require(x.dtype == cos.dtype == sin.dtype, f"x {x.dtype}, cos {cos.dtype} and sin {sin.dtype} must be equal")


@operator("RotaryPositionEmbeddingV2", check=_check_embedding)
def rotary_position_embedding(
    x: Tensor, cos: Tensor, sin: Tensor, mode: int, rotate: Tensor | None, out: Tensor
) -> None:
    turned = (_half, _interleaved)[mode](x.float())
    out.copy_(x.float() * cos.float() + turned * sin.float())


_BSND, _TND = 1, 4


def _check_apply(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: int, mode: str) -> None:
    require(layout in (_BSND, _TND), f"layout {layout} is not supported on {SOC}")
    require(mode == "half", f"rotary_mode {mode!r} is not supported on {SOC}")
    dim, tokens = query.shape[-1], 1 if layout == _TND else 2
    require(dim in (64, 128), f"head_dim must be 64 or 128, not {dim}")
    for name, tensor in (("query", query), ("key", key), ("cos", cos), ("sin", sin)):
        require(tensor.dim() == (3 if layout == _TND else 4), f"{name} has shape {tuple(tensor.shape)}")
        require(tensor.dtype == query.dtype, f"{name} is {tensor.dtype}, query {query.dtype}")
        require(tensor.shape[-1] == dim, f"{name} has last dimension {tensor.shape[-1]}, query {dim}")
        require(
            tensor.shape[:tokens] == query.shape[:tokens], f"{name} {tuple(tensor.shape)}, query {tuple(query.shape)}"
        )
    require(cos.shape[-2] == sin.shape[-2] == 1, f"cos {tuple(cos.shape)}: one head expected")
    require(not (IS_310P and query.dtype == torch.bfloat16), f"{SOC} has no bfloat16")


@operator("ApplyRotaryPosEmbV2", check=_check_apply)
def apply_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: int, mode: str) -> None:
    for x in (query, key):
        x.copy_(x.float() * cos.float() + _half(x.float()) * sin.float())


def _check_cached(
    positions: Tensor, query: Tensor, key: Tensor, cache: Tensor, sections: Ints | None, head_size: int, neox: bool,
    cache_mode: int, query_out: Tensor, key_out: Tensor,
) -> None:  # fmt: skip
    require(not IS_310P, f"the operator does not exist on {SOC}")
    require(not any(sections or []), "sections of positions are not emulated")
    require(cache.dtype == query.dtype == key.dtype, f"cache {cache.dtype}, query {query.dtype}")
    require(cache.shape[-1] <= head_size and query.shape[-1] % head_size == 0, f"cache {cache.shape}, size {head_size}")


@operator("RopeWithSinCosCacheV2", check=_check_cached)
def rope_with_cache(
    positions: Tensor, query: Tensor, key: Tensor, cache: Tensor, sections: Ints | None, head_size: int, neox: bool,
    cache_mode: int, query_out: Tensor, key_out: Tensor,
) -> None:  # fmt: skip
    cos, sin = cache.float()[positions.long()].chunk(2, -1)
    double = (lambda x: torch.cat((x, x), -1)) if neox else (lambda x: x.repeat_interleave(2, -1))
    cos, sin = double(cos)[:, None], double(sin)[:, None]
    for x, out in ((query, query_out), (key, key_out)):
        heads = x.float().view(x.shape[0], -1, head_size)
        turned, rest = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
        turned = turned * cos + (_half if neox else _interleaved)(turned) * sin
        out.copy_(torch.cat((turned, rest), -1).view(x.shape))
