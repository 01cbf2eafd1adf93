"""How a token is chosen from a row of logits: top-k, top-p, min-p, and the draw.

Order and meaning are vLLM's: min-p, then top-k, then top-p over what is left, renormalised. All three keep an upper set
of the row: everything at least as likely as some boundary token, ties with it included. So no row is ever sorted:

* with top-k, the k largest logits are selected and everything else happens among them;
* with top-p alone, a token is drawn from the whole row and kept if the tokens likelier than it do not reach top_p yet.
  Otherwise the boundary lies above it, and the next draw is among the likelier ones. (Rejection sampling; the same idea
  as in FlashInfer's sorting-free kernels.) What is kept has exactly the distribution of the nucleus.

Each row uses its own seed and position and nothing else, and each row's numbers are computed from that row alone: the
same request draws the same tokens in any batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nanovllm.ops.operators import KeepLikeliest
from nanovllm.ops.reference import keep_likeliest, nucleus_boundary
from nanovllm.runner.blocks import BLOCK, argmax, block_sum, greater, take_blocks, top_k
from nanovllm.runner.ragged import Array, to_device
from nanovllm.runner.uniform import uniforms

# How many candidates a row with top_k selects: the first of these above top_k. It depends on the row's own top_k only,
# for with another number of candidates the same row might round differently.
CANDIDATES = (64, 256, 1024, 4096, 16384)


def candidates_for(top_k: int, vocab_size: int) -> int:
    """Number of candidates for a row with ``top_k`` > 0: more than that (do ties go on?), or all there are."""
    return next((c for c in CANDIDATES if top_k < c <= vocab_size), vocab_size)


def draw(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a column of every row with probability proportional to its weight.

    weights float32 [R, N] >= 0, uniform float32 [R, 2] in [0, 1) -> columns int64 [R], total weights [R, 1].

    Inverse of the cumulative distribution in two levels: one number chooses a block by the blocks' sums, the other a
    column of it. A column of weight zero is never drawn. A row with NaN, or without weight, gives some valid column.
    """
    reached = block_sum(weights).cumsum(-1)
    total = reached[:, -1:]
    block = (reached <= uniform[:, :1] * total).sum(-1, keepdim=True).clamp_(max=reached.shape[1] - 1)
    columns, weights = take_blocks(weights, block, 0.0)
    reached = weights.cumsum(-1)
    index = (reached <= uniform[:, 1:] * reached[:, -1:]).sum(-1, keepdim=True).clamp_(max=BLOCK - 1)
    return columns.gather(1, index).squeeze(1), total


def sample_plain(logits: Tensor, seeds: Array, positions: Array) -> Tensor:
    """Draw from softmax(logits [R, V]), which are overwritten. seeds uint64 [R], positions int64 [R] -> int64 [R]."""
    weights = torch.softmax(logits, dim=-1, out=logits)
    return draw(weights, to_device(uniforms(seeds, positions), logits.device))[0]


def sample_top_k(logits: Tensor, k: Array, top_p: Array, min_p: Array, seeds: Array, positions: Array) -> Tensor:
    """Draw among the ``k`` [R] > 0 likeliest, further limited by top_p (>= 1: off) and min_p (0: off): int64 [R].

    All rows of a call have the same ``candidates_for(k)``.
    """
    num_candidates = candidates_for(int(k[0]), logits.shape[1])
    return _sample_top_k(logits, num_candidates, k, top_p, min_p, to_device(uniforms(seeds, positions), logits.device))


def _sample_top_k(logits: Tensor, num_candidates: int, k: Array, top_p: Array, min_p: Array, uniform: Tensor) -> Tensor:
    device = logits.device
    values, columns = top_k(logits, num_candidates)  # [R, C], descending
    boundary = values.gather(1, to_device(k, device).unsqueeze(1) - 1)
    weights = torch.exp(values - values[:, :1])
    weights = weights * ((values >= boundary) & (weights >= to_device(min_p, device).unsqueeze(1)))
    if (top_p < 1.0).any():
        weights = weights * (values >= nucleus_boundary(values, weights, to_device(top_p, device).unsqueeze(1)))
    tokens = columns.gather(1, draw(weights, uniform)[0].unsqueeze(1)).squeeze(1)
    if num_candidates < logits.shape[1]:
        # Ties with the boundary may go on beyond the candidates: select more of those rows.
        open_rows = ((values[:, -1:] >= boundary) & (boundary > -torch.inf)).squeeze(1).nonzero().squeeze(1)
        if open_rows.numel():
            chosen = open_rows.cpu().numpy()
            tokens[open_rows] = _sample_top_k(
                logits.index_select(0, open_rows),
                candidates_for(num_candidates, logits.shape[1]),
                k[chosen],
                top_p[chosen],
                min_p[chosen],
                uniform.index_select(0, open_rows),
            )
    return tokens


def sample_top_p(logits: Tensor, top_p: Array, min_p: Array, seeds: Array, positions: Array) -> Tensor:
    """Draw among the likeliest tokens that reach ``top_p`` [R] (>= 1: off), with min_p [R] (0: off): int64 [R].

    ``logits`` [R, V] are overwritten. Waits for the device once per round of draws; there are few: each is accepted
    with a probability of at least top_p.
    """
    device = logits.device
    weights = torch.softmax(logits, dim=-1, out=logits)
    if min_p.any():
        least = to_device(min_p, device).unsqueeze(1) * weights.amax(-1, keepdim=True)
        weights *= torch.ge(weights, least, out=torch.empty_like(weights))
    tokens, total = draw(weights, to_device(uniforms(seeds, positions), device))
    if (top_p >= 1.0).all():
        return tokens
    share = to_device(top_p, device).unsqueeze(1)
    limit = torch.where(share < 1.0, share * total, torch.inf).squeeze(1)
    rows, drawn, attempt = torch.arange(len(seeds), device=device), tokens, 0
    while True:
        likelier = greater(weights, weights.gather(1, drawn.unsqueeze(1))).mul_(weights)
        above = block_sum(likelier).sum(-1)
        rejected = ((above >= limit) & (above > 0)).nonzero().squeeze(1)  # false for NaN
        if not rejected.numel():
            return tokens
        weights, limit, rows = (x.index_select(0, rejected) for x in (likelier, limit, rows))
        attempt += 1
        chosen = rows.cpu().numpy()
        drawn, _ = draw(weights, to_device(uniforms(seeds[chosen], positions[chosen], attempt), device))
        tokens[rows] = drawn


def choose_by_sorting(
    logits: Tensor,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    seeds: Array,
    positions: Array,
    keep: KeepLikeliest = keep_likeliest,
) -> Tensor:
    """As ``Operators.choose``: all rows in one pass that never asks the device anything; filters sort the vocabulary,
    or do whatever the operator ``keep_likeliest`` of the device does.

    The draws above look at the device's answer before they go on. Where that stalls it longer than a sort takes (an
    NPU, with the next step waiting to be launched), this is the better way.
    """
    device = logits.device
    greedy = temperature == 0.0
    if greedy.all():
        return argmax(logits)
    scaled = logits / to_device(np.where(greedy, np.float32(1.0), temperature), device).unsqueeze(1)
    if ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0)).any():
        scaled = keep(scaled, top_k, top_p, min_p)
    tokens = draw(torch.softmax(scaled, dim=-1), to_device(uniforms(seeds, positions), device))[0]
    return torch.where(to_device(greedy, device), argmax(logits), tokens) if greedy.any() else tokens
