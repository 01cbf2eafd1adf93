"""Token embedding and output head, their vocabulary split over the ranks."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nanovllm.layers.weights import LayerContext, Slots, WeightSlot


class VocabShard:
    """This rank's rows of a [vocab, hidden] matrix.

    Every rank holds ``ceil(vocab / world)`` rows; rows beyond the vocabulary, on the last ranks, are zero padding.
    """

    def __init__(self, vocab_size: int, hidden_size: int, context: LayerContext) -> None:
        self.vocab_size = vocab_size
        rows = -(-vocab_size // context.parallel.world)
        self.start = min(context.parallel.rank * rows, vocab_size)
        self.filled = min(rows, vocab_size - self.start)
        self.weight = context.empty(rows, hidden_size)
        self.weight[self.filled :].zero_()

    def slots(self, name: str) -> Slots:
        """The slot of the matrix called ``name``."""
        shape = (self.vocab_size, self.weight.shape[1])
        return {f"{name}.weight": WeightSlot(self.weight[: self.filled], shape, 0, self.start)}


class Embedding:
    """Token ids -> vectors."""

    def __init__(self, vocab_size: int, hidden_size: int, context: LayerContext) -> None:
        self.shard = VocabShard(vocab_size, hidden_size, context)
        self.parallel = context.parallel

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [T] -> [T, hidden]."""
        if self.parallel.world == 1:
            return F.embedding(token_ids, self.shard.weight)
        local = token_ids - self.shard.start
        elsewhere = (local < 0) | (local >= self.shard.filled)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.shard.weight)
        return self.parallel.all_reduce(rows.masked_fill_(elsewhere[:, None], 0))


class OutputHead:
    """Hidden vectors -> logits.

    A tied head is given the embedding's shard: the two share one matrix, unless the device's ``pack_linear`` copies it.
    """

    def __init__(self, shard: VocabShard, tied: bool, context: LayerContext) -> None:
        self.shard = shard
        self.tied = tied
        self.ops = context.ops
        self.parallel = context.parallel
        self.packed: Any = None

    def finish(self) -> None:
        """Bring the weight into the operator's own form; where that is a copy, an untied original is given up."""
        self.packed = self.ops.pack_linear(self.shard.weight)
        if not self.tied:
            del self.shard.weight

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> logits float32 [S, vocab], whole on every rank."""
        logits = self.parallel.all_gather(self.ops.linear(hidden, self.packed, None))
        return logits[:, : self.shard.vocab_size].float()
