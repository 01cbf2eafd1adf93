"""Log-probabilities of chosen tokens and of the likeliest ones."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.engine.plan import TokenLogprobs
from nanovllm.runner.blocks import block_sum, greater, top_k


def gather_logprobs(
    scores: Tensor, tokens: Tensor, num_likeliest: int, named: Tensor | None = None
) -> list[TokenLogprobs]:
    """For each row of ``scores`` [n, V] its token (``tokens`` int64 [n]) and the ``num_likeliest`` best, descending.

    Behind them the tokens ``named`` (int64 [m]), if any.

    Scores are log-probabilities or logits. The rank of a token is 1 + the number of tokens that score higher.
    """
    if num_likeliest == scores.shape[1]:
        likeliest, ids = scores.sort(dim=-1, descending=True, stable=True)
    else:
        likeliest, ids = top_k(scores, num_likeliest) if num_likeliest else (scores[:, :0], tokens[:, None][:, :0])
    own = scores.gather(1, tokens[:, None])
    ranks = (block_sum(greater(scores, own)).sum(-1) + 1).long().tolist()  # exact: whole numbers below 2**24
    if named is not None:
        ids = torch.cat([ids, named.expand(len(scores), -1)], dim=1)
        likeliest = torch.cat([likeliest, scores.index_select(1, named)], dim=1)
    all_ids = torch.cat([tokens[:, None], ids], dim=1).cpu().numpy()
    all_values = torch.cat([own, likeliest], dim=1).cpu().numpy()
    return [TokenLogprobs(*columns) for columns in zip(all_ids, all_values, ranks, strict=True)]
