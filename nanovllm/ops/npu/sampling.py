"""What may be drawn from a row of logits, through torch_npu's ApplyTopKTopP, on Atlas A2 and A3.

The operator takes top_k from 1 to 1024 and no "off", so that rows go three ways, each by its own parameters alone: a
row's result does not depend on its neighbours. It cuts ties with the last token apart; here they stay.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.ops.operators import Array, KeepLikeliest, Operators
from nanovllm.ops.transfer import to_device

_LARGEST_K = 1024


class NpuSampling:
    """The operator ``keep_likeliest``.

    Args:
        library: ``npu_ops``, or what stands for it where there is no NPU.
    """

    def __init__(self, base: Operators, library: Any) -> None:
        self._base, self._library = base, library

    def keep_likeliest(self, logits: Tensor, k: Array, top_p: Array, min_p: Array) -> Tensor:
        """See ``reference.keep_likeliest``."""
        vocab_size = logits.shape[1]
        limited = (k > 0) & (k < vocab_size)
        beyond = limited & (k > _LARGEST_K)
        few = limited & ~beyond
        nucleus = ~limited & ((top_p < 1.0) | (min_p > 0.0))
        for which, keep in ((few, self._top_k_top_p), (nucleus, self._top_p), (beyond, self._base.keep_likeliest)):
            logits = _of_rows(keep, which, logits, k, top_p, min_p)
        return logits

    def _top_k_top_p(self, logits: Tensor, k: Array, top_p: Array, min_p: Array) -> Tensor:
        return self._keep(logits, to_device(k.astype(np.int32), logits.device), top_p, min_p)

    def _top_p(self, logits: Tensor, k: Array, top_p: Array, min_p: Array) -> Tensor:
        return self._keep(logits, None, top_p, min_p)

    def _keep(self, logits: Tensor, k: Tensor | None, top_p: Array, min_p: Array) -> Tensor:
        if min_p.any():
            with np.errstate(divide="ignore"):
                distance = to_device(np.log(min_p).astype(np.float32), logits.device).unsqueeze(1)
            logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + distance, -torch.inf)
        share = to_device(np.minimum(top_p, 1.0).astype(np.float32), logits.device)
        kept = self._library.top_k_top_p(logits, share, k)
        lowest = kept.masked_fill(kept == -torch.inf, torch.inf).amin(-1, keepdim=True)
        return logits.masked_fill(logits < lowest, -torch.inf)


def _of_rows(keep: KeepLikeliest, which: Array, logits: Tensor, k: Array, top_p: Array, min_p: Array) -> Tensor:
    """``keep`` for the rows where ``which`` [R] is true; the others stay as they are."""
    if which.all():
        return keep(logits, k, top_p, min_p)
    rows = np.flatnonzero(which)
    if not len(rows):
        return logits
    index = to_device(rows, logits.device)
    return logits.index_copy(0, index, keep(logits.index_select(0, index), k[rows], top_p[rows], min_p[rows]))
