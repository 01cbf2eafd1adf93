"""Self-attention over the paged cache."""

from __future__ import annotations

from torch import Tensor

from nanovllm.errors import ParameterError
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear, Rows
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.weights import LayerContext
from nanovllm.ops import AttentionMetadata
from nanovllm.parallel import ParallelContext


class HeadShard:
    """Which heads a rank holds: its share of the query heads, and the KV heads those read.

    With fewer KV heads than ranks, each KV head lives on several ranks.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, parallel: ParallelContext) -> None:
        rank, world = parallel.rank, parallel.world
        if num_heads % world or (num_kv_heads % world and world % num_kv_heads):
            raise ParameterError(
                f"{num_heads} query heads and {num_kv_heads} KV heads cannot be split evenly",
                "tensor_parallel_size",
                world,
            )
        self.num_heads = num_heads // world
        self.num_kv_heads = max(1, num_kv_heads // world)
        self.head_dim = head_dim
        first_kv_head = rank * num_kv_heads // world
        self.q = Rows(num_heads * head_dim, rank * self.num_heads * head_dim, self.num_heads * head_dim)
        self.kv = Rows(num_kv_heads * head_dim, first_kv_head * head_dim, self.num_kv_heads * head_dim)


class Attention:
    """q, k, v as one product; optional norm of each q and k head (Qwen3); rotary; cache; attention; output product."""

    def __init__(
        self,
        hidden_size: int,
        heads: HeadShard,
        *,
        qkv_bias: bool,
        output_bias: bool,
        qk_norm_eps: float | None,
        window: int | None,
        context: LayerContext,
    ) -> None:
        self.ops = context.ops
        self.heads = heads
        self.qkv = ColumnParallelLinear(hidden_size, [heads.q, heads.kv, heads.kv], qkv_bias, context)
        self.output = RowParallelLinear(heads.q, hidden_size, output_bias, context)
        self.qk_norm_eps = qk_norm_eps or 0.0
        self.q_norm = None if qk_norm_eps is None else RMSNorm(heads.head_dim, qk_norm_eps, context)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(heads.head_dim, qk_norm_eps, context)
        self.scale = heads.head_dim**-0.5
        self.window = window

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata
    ) -> Tensor:
        """x [T, hidden] -> [T, hidden]; the new tokens' keys and values are in the cache afterwards."""
        qkv = self._project(x)
        q_weight, k_weight = (norm and norm.weight for norm in (self.q_norm, self.k_norm))
        q = self.ops.norm_rotate_write(
            qkv, q_weight, k_weight, self.qk_norm_eps, cos, sin, k_cache, v_cache, meta.slot_mapping
        )  # [T, H, D]
        out = self.ops.paged_attention(q, k_cache, v_cache, meta, self.scale, self.window)  # [T, H, D]
        return self.output(out.flatten(1))

    def _project(self, x: Tensor) -> Tensor | list[Tensor]:
        """x [T, hidden] -> q | k | v [T, H + 2 Hk, D], or a list of the three where the device wants them apart."""
        shape, divide = (x.shape[0], -1, self.heads.head_dim), self.ops.linear_parts
        if divide is None:
            return self.qkv(x).view(shape)
        return [part.view(shape) for part in self.qkv.split(x, divide)]
