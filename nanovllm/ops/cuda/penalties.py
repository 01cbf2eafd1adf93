"""Penalties on what a row has read and written, from the token table: nothing of a row's history leaves the device.

One program looks at a piece of one row's history. A token that occurs several times is penalised once: whoever sets its
bit in a bitmap of the vocabulary first does it. Occurrences are counted by the logit itself: each of them lowers it by
the same number, so that their order does not show.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.ops.operators import Array
from nanovllm.ops.transfer import to_device

_PIECE = 1024  # tokens of a history that a program looks at
_FIRST, _EVERY = 0, 1  # occurrences of a token


def penalise(
    logits: Tensor,
    tokens: Tensor,
    which: Array,
    rows: Array,
    positions: Array,
    num_prompt: Array,
    repetition: Array,
    frequency: Array,
    presence: Array,
) -> None:
    """The operator ``penalise``: see ``Operators``."""
    count = len(which)
    packed = np.empty((6, count), np.int64)
    packed[:4] = which, rows, positions, num_prompt
    packed[4:].view(np.float32).reshape(4, count)[:3] = repetition, frequency, presence
    whole = to_device(packed, logits.device)
    places, (factors, per_token, once, _) = whole[:4], whole[4:].view(torch.float32).view(4, count)
    if (repetition != 1.0).any():
        _launch(logits, tokens, places, factors, int(positions.max()), _FIRST, repeats=True)
    output = int((positions - num_prompt).max())
    if output > 0 and frequency.any():
        _launch(logits, tokens, places, per_token, output, _EVERY, repeats=False)
    if output > 0 and presence.any():
        _launch(logits, tokens, places, once, output, _FIRST, repeats=False)


def _launch(
    logits: Tensor, tokens: Tensor, places: Tensor, amounts: Tensor, longest: int, occurrences: int, repeats: bool
) -> None:
    count, words = places.shape[1], triton.cdiv(logits.shape[1], 32)
    met = torch.zeros((count, words) if occurrences == _FIRST else (1, 1), dtype=torch.int32, device=logits.device)
    _penalise[(count, triton.cdiv(longest, _PIECE))](
        logits, tokens, places, amounts, met, count, tokens.stride(0),
        V=logits.shape[1], WORDS=words, FIRST=occurrences == _FIRST, REPEATS=repeats, PIECE=_PIECE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "width"], do_not_specialize_on_alignment=["places", "amounts"])
def _penalise(
    logits, tokens, places, amounts, met, count, width,
    V: tl.constexpr, WORDS: tl.constexpr, FIRST: tl.constexpr, REPEATS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """REPEATS: divide or multiply (Keskar et al. 2019, CTRL, section 4.1), over prompt and output; else subtract, over
    the output. FIRST: once for each token; else for each occurrence."""
    entry = tl.program_id(0)
    line, row = tl.load(places + entry), tl.load(places + count + entry)
    end = tl.load(places + 2 * count + entry)
    amount = tl.load(amounts + entry)
    position = tl.program_id(1).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    if not REPEATS:
        position += tl.load(places + 3 * count + entry)
    concerned = position < end
    token = tl.load(tokens + row * width + position, mask=concerned, other=0)
    place = logits + line * V + token
    if FIRST:
        bit = (tl.full([PIECE], 1, tl.int32) << (token % 32)).to(tl.int32)
        before = tl.atomic_or(met + entry.to(tl.int64) * WORDS + token // 32, bit, mask=concerned, sem="relaxed")
        concerned = concerned & ((before & bit) == 0)
        x = tl.load(place, mask=concerned, other=0.0)
        if REPEATS:
            x = tl.where(x > 0, x / amount, x * amount)
        else:
            x = x - amount
        tl.store(place, x, mask=concerned)
    else:
        tl.atomic_add(place, tl.zeros([PIECE], tl.float32) - amount, mask=concerned, sem="relaxed")
