"""Token embedding and output head, their vocabulary split over the ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nanovllm.layers.weights import Layer, LayerContext, Slots, WeightSlot


class VocabShard:
    """This rank's rows of a [vocab, hidden] matrix.

    Every rank holds ``ceil(vocab / world)`` rows; rows beyond the vocabulary, on the last ranks, are zero padding.

    Attributes:
        weight: the rows; once an output head has packed them, in the operators' own form.
    """

    def __init__(self, vocab_size: int, hidden_size: int, context: LayerContext) -> None:
        self.vocab_size = vocab_size
        rows = -(-vocab_size // context.parallel.world)
        self.start = min(context.parallel.rank * rows, vocab_size)
        self.filled = min(rows, vocab_size - self.start)
        self.weight: Any = context.empty_matrix(rows, hidden_size)
        self.weight[self.filled :].zero_()

    def slots(self, name: str, layer: Layer | None = None) -> Slots:
        """The slot of the matrix called ``name``; ``layer`` packs it."""
        shape = (self.vocab_size, self.weight.shape[1])
        return {f"{name}.weight": WeightSlot(self.weight[: self.filled], shape, 0, self.start, layer)}


class Embedding:
    """Token ids -> vectors."""

    def __init__(self, vocab_size: int, hidden_size: int, context: LayerContext) -> None:
        self.shard = VocabShard(vocab_size, hidden_size, context)
        self.ops = context.ops
        self.parallel = context.parallel

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [T] -> [T, hidden]."""
        if self.parallel.world == 1:
            return self.ops.weight_rows(self.shard.weight, token_ids)
        local = token_ids - self.shard.start
        elsewhere = (local < 0) | (local >= self.shard.filled)
        rows = self.ops.weight_rows(self.shard.weight, local.masked_fill(elsewhere, 0))
        return self.parallel.all_reduce(rows.masked_fill_(elsewhere[:, None], 0))


class OutputHead:
    """Hidden vectors -> logits. A tied head is given the embedding's shard: the two share one matrix."""

    def __init__(self, shard: VocabShard, context: LayerContext) -> None:
        self.shard = shard
        self.finished = False
        self.ops = context.ops
        self.parallel = context.parallel

    def finish(self) -> None:
        """Bring the weight into the operators' own form, for both of those who share it. Idempotent."""
        if not self.finished:
            self.shard.weight = self.ops.pack_linear(self.shard.weight)
            self.finished = True

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> logits float32 [S, vocab], whole on every rank."""
        logits = self.parallel.all_gather(self.ops.linear(hidden, self.shard.weight, None))
        return logits[:, : self.shard.vocab_size].float()
