"""The decoder that Llama, Qwen2, Qwen3 and Mistral share; a family is a `DecoderSpec`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nanovllm.errors import ParameterError
from nanovllm.layers.attention import Attention, HeadShard
from nanovllm.layers.embedding import Embedding, OutputHead, VocabShard
from nanovllm.layers.linear import Rows
from nanovllm.layers.mlp import GatedMLP
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rope_scaling import RopeConfig
from nanovllm.layers.rotary import RotaryTable
from nanovllm.layers.weights import LayerContext, Slots
from nanovllm.ops import AttentionMetadata

KVCaches = Sequence[tuple[Tensor, Tensor]]  # K and V of each layer, [num_blocks, block_size, Hk, D]


@dataclass(frozen=True)
class WeightNames:
    """What a checkpoint calls its tensors. Those of a layer follow ``layer`` with the layer's number filled in."""

    embedding: str = "model.embed_tokens"
    layer: str = "model.layers.{}."
    attention_norm: str = "input_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    output: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    norm: str = "model.norm"
    head: str = "lm_head"


@dataclass(frozen=True)
class DecoderSpec:
    """A dense decoder, declared: sizes, and the switches in which families differ."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]  # one per layer: the sliding window, None for full attention
    norm_eps: float
    activation: str
    rope: RopeConfig
    tied: bool  # the output head is the embedding
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    names: WeightNames = WeightNames()


class DecoderLayer:
    """norm -> attention -> norm -> MLP, each with a residual connection (pre-norm)."""

    def __init__(self, spec: DecoderSpec, window: int | None, heads: HeadShard, context: LayerContext) -> None:
        world = context.parallel.world
        if spec.intermediate_size % world:
            raise ParameterError(
                f"the MLP's {spec.intermediate_size} units cannot be split evenly", "tensor_parallel_size", world
            )
        count = spec.intermediate_size // world
        inner = Rows(spec.intermediate_size, context.parallel.rank * count, count)
        self.attention_norm = RMSNorm(spec.hidden_size, spec.norm_eps, context)
        self.attention = Attention(
            spec.hidden_size,
            heads,
            qkv_bias=spec.qkv_bias,
            output_bias=spec.output_bias,
            qk_norm_eps=spec.norm_eps if spec.qk_norm else None,
            window=window,
            context=context,
        )
        self.mlp_norm = RMSNorm(spec.hidden_size, spec.norm_eps, context)
        self.mlp = GatedMLP(spec.hidden_size, inner, spec.activation, spec.mlp_bias, context)

    def slots(self, prefix: str, names: WeightNames) -> Slots:
        """The layer's slots, their names beginning with ``prefix``."""
        attention = self.attention
        found = {
            **self.attention_norm.slots(prefix + names.attention_norm),
            **attention.qkv.slots([prefix + names.q, prefix + names.k, prefix + names.v]),
            **attention.output.slots(prefix + names.output),
            **self.mlp_norm.slots(prefix + names.mlp_norm),
            **self.mlp.gate_up.slots([prefix + names.gate, prefix + names.up]),
            **self.mlp.down.slots(prefix + names.down),
        }
        if attention.q_norm is not None and attention.k_norm is not None:
            found |= attention.q_norm.slots(prefix + names.q_norm) | attention.k_norm.slots(prefix + names.k_norm)
        return found

    def finish(self) -> None:
        """Pack the matrices, once they are loaded."""
        for linear in (self.attention.qkv, self.attention.output, self.mlp.gate_up, self.mlp.down):
            linear.finish()

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: tuple[Tensor, Tensor],
        meta: AttentionMetadata,
    ) -> tuple[Tensor, Tensor]:
        """``x`` [T, hidden] still has to be added to ``residual``: the norm behind it does both at once."""
        x, residual = self.attention_norm.add(x, residual)
        x = self.attention(x, cos, sin, *cache, meta)
        x, residual = self.mlp_norm.add(x, residual)
        return self.mlp(x), residual


class Decoder:
    """A decoder-only language model on one rank.

    Built with uninitialised weights; ``load_weights`` fills ``slots()`` and calls ``finish()``.
    """

    def __init__(self, spec: DecoderSpec, context: LayerContext, max_model_len: int) -> None:
        heads = HeadShard(spec.num_heads, spec.num_kv_heads, spec.head_dim, context.parallel)
        self.spec = spec
        self.ops = context.ops
        self.dtype = context.dtype
        self.kv_dtype = context.dtype  # of keys and values; a runner may choose another before it makes the cache
        self.num_layers = len(spec.windows)
        self.num_kv_heads = heads.num_kv_heads  # of this rank
        self.head_dim = spec.head_dim
        self.vocab_size = spec.vocab_size
        self.windows = tuple(dict.fromkeys(spec.windows))  # the distinct ones
        self.rotary = RotaryTable(spec.rope, max_model_len, context)
        self.embedding = Embedding(spec.vocab_size, spec.hidden_size, context)
        self.layers = [DecoderLayer(spec, window, heads, context) for window in spec.windows]
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps, context)
        shard = self.embedding.shard if spec.tied else VocabShard(spec.vocab_size, spec.hidden_size, context)
        self.head = OutputHead(shard, context)

    def slots(self) -> Slots:
        """Every checkpoint tensor this model needs, by its name in the checkpoint."""
        names = self.spec.names
        found = self.embedding.shard.slots(names.embedding, self.head if self.spec.tied else None)
        for number, layer in enumerate(self.layers):
            found |= layer.slots(names.layer.format(number), names)
        found |= self.norm.slots(names.norm)
        if not self.spec.tied:
            found |= self.head.shard.slots(names.head, self.head)
        return found

    def finish(self) -> None:
        """Pack the matrices, once they are loaded, layer by layer; those that are packed already stay as they are."""
        for layer in self.layers:
            layer.finish()
        self.head.finish()

    def forward(self, input_ids: Tensor, positions: Tensor, kv_caches: KVCaches, meta: AttentionMetadata) -> Tensor:
        """Compute the new tokens of a batch and leave their keys and values in the caches.

        input_ids, positions int64 [T] -> hidden states [T, hidden] after the last norm. Fills ``meta.backend`` unless
        the caller has.
        """
        if meta.backend is None:
            self.ops.prepare_attention(meta, self.windows, self.dtype)
        cos, sin = self.rotary.rows(positions)
        x = self.embedding(input_ids)
        residual: Tensor | None = None
        for layer, cache in zip(self.layers, kv_caches, strict=True):
            x, residual = layer(x, residual, cos, sin, cache, meta)
        return self.norm.add(x, residual)[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> logits float32 [S, vocab_size]."""
        return self.head(hidden)
