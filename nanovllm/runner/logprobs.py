"""Log-probabilities of chosen tokens and of the likeliest ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nanovllm.engine.plan import TokenLogprobs
from nanovllm.ops.transfer import HostCopy
from nanovllm.runner.blocks import block_sum, greater, top_k

Reader = Callable[[], list[TokenLogprobs]]  # waits for the device


class LateLogprobs(Mapping[int, TokenLogprobs]):
    """Log-probabilities by index, on their way from the device: whoever looks at them waits.

    ``parts`` are the indices and the reader of what was gathered together.
    """

    def __init__(self, parts: Sequence[tuple[list[int], Reader]]) -> None:
        self._parts = parts
        self._found: dict[int, TokenLogprobs] | None = None

    def _read(self) -> dict[int, TokenLogprobs]:
        if self._found is None:
            self._found = {}
            for indices, read in self._parts:
                self._found.update(zip(indices, read(), strict=True))
        return self._found

    def __getitem__(self, index: int) -> TokenLogprobs:
        return self._read()[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


def gather_logprobs(scores: Tensor, tokens: Tensor, num_likeliest: int, named: Tensor | None = None) -> Reader:
    """For each row of ``scores`` [n, V] its token (``tokens`` int64 [n]) and the ``num_likeliest`` best, descending.

    Behind them the tokens ``named`` (int64 [m]), if any.

    Scores are log-probabilities or logits. The rank of a token is 1 + the number of tokens that score higher.
    """
    if num_likeliest == scores.shape[1]:
        likeliest, ids = scores.sort(dim=-1, descending=True, stable=True)
    else:
        likeliest, ids = top_k(scores, num_likeliest) if num_likeliest else (scores[:, :0], tokens[:, None][:, :0])
    own = scores.gather(1, tokens[:, None])
    ranks = (block_sum(greater(scores, own)).sum(-1, keepdim=True) + 1).long()  # exact: whole numbers below 2**24
    if named is not None:
        ids = torch.cat([ids, named.expand(len(scores), -1)], dim=1)
        likeliest = torch.cat([likeliest, scores.index_select(1, named)], dim=1)
    whole = HostCopy(torch.cat([ranks, tokens[:, None], ids], dim=1))
    values = HostCopy(torch.cat([own, likeliest], dim=1))

    def read() -> list[TokenLogprobs]:
        numbers = whole.wait().numpy()
        rows = zip(numbers[:, 1:], values.wait().numpy(), numbers[:, 0].tolist(), strict=True)
        return [TokenLogprobs(*row) for row in rows]

    return read
