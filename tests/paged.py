"""Drive a model through its paged cache by hand: shuffled blocks, ragged batches, any chunk size."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovllm.models import Decoder, build_model, load_weights
from nanovllm.ops import AttentionMetadata, Operators, operator_table
from nanovllm.parallel import ParallelContext


def load_model(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_model_len: int = 64,
    attention_backend: str | None = None,
    ops: Operators | None = None,
    parallel: ParallelContext | None = None,
    **overrides: Any,
) -> Decoder:
    """Build and fill the model of a checkpoint folder; ``overrides`` replace values of its config.json."""
    config = {**json.loads((path / "config.json").read_text()), **overrides}
    model = build_model(
        config,
        config["architectures"][0],
        dtype=dtype,
        device="cpu",
        ops=ops or operator_table("cpu", attention_backend),
        parallel=parallel or ParallelContext(),
        max_model_len=max_model_len,
    )
    load_weights(model, path, "auto", 0)
    return model


@dataclass
class Sequence:
    tokens: list[int]
    blocks: list[int]
    end: int  # stop when so many tokens are known
    computed: int = 0
    logits: list[Tensor] = field(default_factory=list)  # one [n, vocab] per step


def make_metadata(tables: list[list[int]], contexts: list[int], news: list[int], block_size: int) -> AttentionMetadata:
    """Metadata of a batch whose row ``i`` has ``contexts[i]`` cached and ``news[i]`` new tokens in ``tables[i]``.

    Rows with one new token must come first.
    """
    width = max(len(table) for table in tables) + 1
    slots = [
        table[position // block_size] * block_size + position % block_size
        for table, context, new in zip(tables, contexts, news, strict=True)
        for position in range(context, context + new)
    ]
    starts = [0]
    for new in news:
        starts.append(starts[-1] + new)
    lengths = [context + new for context, new in zip(contexts, news, strict=True)]
    return AttentionMetadata(
        query_start_loc=starts,
        seq_lens=lengths,
        num_decodes=news.count(1),
        max_query_len=max(news),
        max_seq_len=max(lengths),
        block_table=torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        block_size=block_size,
    )


@torch.inference_mode()
def run_paged(
    model: Decoder, prompts: list[list[int]], *, chunk: int, max_tokens: int, block_size: int = 4, seed: int = 0
) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy decoding, all prompts in one batch, at most ``chunk`` tokens of a row per step.

    Returns the output tokens and the logits at every position [prompt + output - 1, vocab] of each prompt. The cache
    begins full of NaN: whatever reads a slot that was not written shows.
    """
    need = [-(-(len(prompt) + max_tokens) // block_size) for prompt in prompts]
    ids = list(range(1, sum(need) + 1))
    random.Random(seed).shuffle(ids)
    shape = (len(ids) + 1, block_size, model.num_kv_heads, model.head_dim)
    caches = [
        (torch.full(shape, torch.nan, dtype=model.dtype), torch.full(shape, torch.nan, dtype=model.dtype))
        for _ in range(model.num_layers)
    ]
    sequences = [
        Sequence(list(prompt), [ids.pop() for _ in range(count)], len(prompt) + max_tokens)
        for prompt, count in zip(prompts, need, strict=True)
    ]
    while active := [s for s in sequences if len(s.tokens) < s.end]:
        news = {id(s): min(chunk, len(s.tokens) - s.computed) for s in active}
        active.sort(key=lambda s: news[id(s)] != 1)  # rows with one new token first; stable
        contexts, counts = [s.computed for s in active], [news[id(s)] for s in active]
        meta = make_metadata([s.blocks for s in active], contexts, counts, block_size)
        ends = [context + new for context, new in zip(contexts, counts, strict=True)]
        tokens = [t for s, end in zip(active, ends, strict=True) for t in s.tokens[s.computed : end]]
        positions = [p for s, end in zip(active, ends, strict=True) for p in range(s.computed, end)]
        hidden = model.forward(torch.tensor(tokens), torch.tensor(positions), caches, meta)
        logits = model.compute_logits(hidden).split(counts)
        for s, end, rows in zip(active, ends, logits, strict=True):
            s.logits.append(rows)
            s.computed = end
            if end == len(s.tokens):
                s.tokens.append(int(rows[-1].argmax()))
    outputs = [s.tokens[len(prompt) :] for s, prompt in zip(sequences, prompts, strict=True)]
    return outputs, [torch.cat(s.logits) for s in sequences]
