"""The KV cache: how many blocks memory allows, and the tensors."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanovllm.errors import ParameterError
from nanovllm.runner.trial import trial_blocks, try_step

if TYPE_CHECKING:
    from nanovllm.config import EngineConfig
    from nanovllm.models import Decoder
    from nanovllm.platforms import Platform

logger = logging.getLogger("nanovllm")

_GIB = 2**30
_RESERVE = 512 * 2**20  # bytes left to the tokenizer, the server and whatever else the process does


def bytes_per_block(model: Decoder, block_size: int) -> int:
    """Bytes of K and V of one block in all layers of this rank."""
    return 2 * model.num_layers * block_size * model.num_kv_heads * model.head_dim * model.kv_dtype.itemsize


def activation_bytes(config: EngineConfig, model: Decoder) -> int:
    """A bound on what a step of the largest size holds beside weights and cache, from shapes alone.

    No trial run at start: on a CPU it would cost more than the rest of the start-up, and nothing here depends on data.
    """
    spec, scheduler = model.spec, config.scheduler
    heads = spec.num_heads + 2 * model.num_kv_heads
    # Residual, norm and its float32 copies; gate, up and their product; q, k, v, their rotated copies, the output.
    width = 6 * spec.hidden_size + 4 * spec.intermediate_size + 3 * heads * model.head_dim
    gathered = 2 * config.model.max_model_len * model.num_kv_heads * model.head_dim  # K and V of one row's history
    logits = 4 * 3 * scheduler.max_num_seqs * model.vocab_size  # float32: logits, and two copies while sampling
    return (scheduler.max_num_batched_tokens * width + gathered) * model.dtype.itemsize + logits


def step_bytes(config: EngineConfig, model: Decoder, platform: Platform) -> int:
    """What a step of the largest size holds beside weights and cache: tried where that is quick, or from shapes."""
    layer = allocate(model, trial_blocks(config), config.cache.block_size, model.norm.weight.device, num_layers=1)
    caches = layer * model.num_layers
    tried = platform.peak_memory(lambda: try_step(config, model, caches))
    return activation_bytes(config, model) if tried is None else tried


def count_blocks(config: EngineConfig, model: Decoder, platform: Platform) -> int:
    """Number of blocks the cache shall have, the padding block included.

    In this order: ``num_blocks`` as given; what ``memory_bytes`` hold; what free memory allows, but not more than
    ``max_num_seqs`` requests of ``max_model_len`` tokens could fill.

    Raises:
        ParameterError: not even one block besides the padding block fits.
    """
    cache, scheduler = config.cache, config.scheduler
    size = bytes_per_block(model, cache.block_size)
    if cache.num_blocks is not None:
        num_blocks, parameter, given = cache.num_blocks, "num_gpu_blocks_override", cache.num_blocks
    elif cache.memory_bytes is not None:
        num_blocks, parameter, given = cache.memory_bytes // size, "kv_cache_memory_bytes", cache.memory_bytes
    else:
        free = platform.memory_budget(cache.memory_utilization) - step_bytes(config, model, platform) - _RESERVE
        useful = scheduler.max_num_seqs * -(-config.model.max_model_len // cache.block_size) + 1
        num_blocks, parameter, given = min(int(free // size), useful), "gpu_memory_utilization", None
    if num_blocks < 2:
        raise ParameterError(
            f"no room for the KV cache: a block of {cache.block_size} tokens takes {size / 2**20:.2f} MiB and at least "
            f"two are needed. Give the cache more memory (kv_cache_memory_bytes), free some "
            f"({platform.available_memory() / _GIB:.2f} GiB are available), or lower max_num_batched_tokens or "
            "max_num_seqs",
            parameter,
            cache.memory_utilization if given is None else given,
        )
    return num_blocks


def allocate(
    model: Decoder, num_blocks: int, block_size: int, device: torch.device, num_layers: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """K and V of every layer (or of ``num_layers``), [num_blocks, block_size, num_kv_heads, head_dim] unless the device
    lays its cache out in another way.

    Not initialised, so that a CPU commits memory only where something is written: attention reads no slot before it is
    written. The padding block is the exception.
    """
    shape = (num_blocks, block_size, model.num_kv_heads, model.head_dim)
    layers = model.num_layers if num_layers is None else num_layers
    if model.ops.new_caches is not None:
        return model.ops.new_caches(layers, *shape, model.kv_dtype, device)
    new_cache = model.ops.new_cache or _plain_cache
    return [
        (new_cache(*shape, model.kv_dtype, device), new_cache(*shape, model.kv_dtype, device)) for _ in range(layers)
    ]


def _plain_cache(
    num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    cache = torch.empty((num_blocks, block_size, kv_heads, head_dim), dtype=dtype, device=device)
    cache[0].zero_()
    return cache


def log_size(config: EngineConfig, num_blocks: int, num_bytes: int) -> None:
    """Tell how much the cache holds."""
    tokens = (num_blocks - 1) * config.cache.block_size
    logger.info(
        "KV cache size: %s tokens (%.2f GiB), block size %d, maximum concurrency for %s tokens per request: %.2fx",
        f"{tokens:,}",
        num_bytes / _GIB,
        config.cache.block_size,
        f"{config.model.max_model_len:,}",
        tokens / config.model.max_model_len,
    )
