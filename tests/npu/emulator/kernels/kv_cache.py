"""ScatterPaKvCache: storing keys and values in the paged cache.

``cache_mode`` says how the caches' bytes are laid out, and its default is not the plain one: "PA_NZ" puts head after
head in columns of 16 (float16), "Norm" keeps [block, position, head, dim].
"""

from __future__ import annotations

from .decode import Ints, Tensor
from .registry import IS_310P, SOC, operator, require


def _check(
    key: Tensor, key_cache: Tensor, slots: Tensor, value: Tensor, value_cache: Tensor, compress_lens: Tensor | None,
    compress_offsets: Tensor | None, lens: Tensor | None, mode: str, scatter_mode: str, strides: Ints, offsets: Ints,
) -> None:  # fmt: skip
    require(not IS_310P, f"the operator does not exist on {SOC}")
    require(compress_lens is None and compress_offsets is None and lens is None, "compression is not emulated")
    require(mode in ("", "Norm", "PA_NZ"), f"cache_mode {mode!r}")
    require(scatter_mode in ("", "None"), f"scatter_mode {scatter_mode!r} is not emulated")
    require(key.dim() == 3 and value.dim() == 3, f"key {tuple(key.shape)} must be [tokens, heads, dim]")
    require(key.shape[:2] == value.shape[:2], f"key {tuple(key.shape)} and value {tuple(value.shape)}")
    require(tuple(slots.shape) == (key.shape[0],), f"{tuple(slots.shape)} slots for {key.shape[0]} tokens")
    require(str(slots.dtype) in ("torch.int32", "torch.int64"), f"slots of {slots.dtype}")
    for name, tensor in (("key", key), ("value", value), ("key_cache", key_cache), ("value_cache", value_cache)):
        require(tensor.dtype == key.dtype, f"{name} is {tensor.dtype}, key {key.dtype}")
        require(tensor.is_contiguous(), f"{name} must be contiguous, its strides are {tensor.stride()}")
    for new, cache in ((key, key_cache), (value, value_cache)):
        heads, dim = new.shape[1:]
        shape = tuple(cache.shape)
        require(cache.dim() == 4, f"the cache must have 4 dimensions, not {shape}")
        if mode == "PA_NZ":
            columns = 32 // new.element_size()
            layout = f"[blocks, heads * dim / {columns}, block_size, {columns}]"
            require(
                shape[3] == columns and shape[1] * columns == heads * dim, f"cache_mode PA_NZ: {shape} is not {layout}"
            )
        else:
            require(shape[2:] == (heads, dim), f"cache_mode Norm: {shape} is not [blocks, block_size, {heads}, {dim}]")


def scatter_tokens(new: Tensor, cache: Tensor, slots: Tensor, nz: bool) -> None:
    """Row i of ``new`` [tokens, heads, dim] to position ``slots[i]`` of the cache."""
    blocks, size = cache.shape[0], cache.shape[2 if nz else 1]
    slots = slots.long()
    wrong = [int(slot) for slot in slots if not 0 <= int(slot) < blocks * size]
    require(not wrong, f"MTE DDR address out of range: slot {wrong[:1]} of a cache of {blocks * size} positions")
    require(slots.unique().numel() == slots.numel(), f"slots must be unique: {slots.tolist()}")
    if nz:
        columns = cache.shape[3]
        cache[slots // size, :, slots % size] = new.reshape(new.shape[0], -1, columns)
    else:
        cache[slots // size, slots % size] = new


@operator("ScatterPaKvCache", check=_check)
def scatter_pa_kv_cache(
    key: Tensor, key_cache: Tensor, slots: Tensor, value: Tensor, value_cache: Tensor, compress_lens: Tensor | None,
    compress_offsets: Tensor | None, lens: Tensor | None, mode: str, scatter_mode: str, strides: Ints, offsets: Ints,
) -> None:  # fmt: skip
    for new, cache in ((key, key_cache), (value, value_cache)):
        scatter_tokens(new, cache, slots, mode == "PA_NZ")
