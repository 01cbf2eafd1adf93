"""Choosing tokens in two launches: no sort, and the host waits for nothing.

The meaning is that of runner/choice.py: min-p, top-k and top-p keep an upper set of a row, ties with its boundary
included.

1. ``summarise`` reads all logits once, in pieces: each piece's maximum, and its sum of exponentials.
2. ``choose``, one program per row, finds the row's maximum and sum from those of its pieces. A greedy row is done then,
   and a plain one after a look into one piece. The others go through their row a few more times:
   top-k finds the k-th largest number digit by digit (radix selection: four passes over 8 bits each); top-p draws, adds
   up what is likelier than the draw, and draws among that if the nucleus ends above it (rejection, as in FlashInfer's
   sorting-free kernels).

The random numbers are those of runner/uniform.py, worked out here since only the device knows how many draws it takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.ops.operators import Array
from nanovllm.ops.transfer import to_device

_PIECE = 4096


@dataclass(slots=True)
class Choices:
    """How each row chooses, tensors [S] on the device.

    Attributes:
        temperature: float32; 0 is greedy.
        top_k: int32; 0 is off. top_p, min_p: float32; 1 and 0 are off.
        seeds, positions: int64; a draw depends on these alone (a seed's 64 bits, read as a signed number).
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor


def choose(logits: Tensor, choices: Choices) -> Tensor:
    """A column of every row of ``logits`` float32 [S, V], contiguous: int64 [S]. The logits stay as they are.

    A row with NaN gives a column that holds one, a row of -inf some column.
    """
    rows, width = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return tokens
    pieces = triton.cdiv(width, _PIECE)
    summary = torch.empty((2, rows, pieces), dtype=torch.float32, device=logits.device)
    _summarise[(rows, pieces)](logits, choices.temperature, summary, rows, V=width, PIECE=_PIECE, num_warps=8)
    _choose[(rows,)](
        logits, summary, choices.temperature, choices.top_k, choices.top_p, choices.min_p, choices.seeds,
        choices.positions, tokens, rows,
        V=width, PIECE=_PIECE, PIECES=pieces, PIECES_PAD=max(2, triton.next_power_of_2(pieces)), num_warps=8,
    )  # fmt: skip
    return tokens


def choose_tokens(
    logits: Tensor, temperature: Array, top_k: Array, top_p: Array, min_p: Array, seeds: Array, positions: Array
) -> Tensor:
    """The operator ``choose``: the rows' settings go to the device in one transfer."""
    packed = np.empty((4, len(seeds)), np.int64)
    packed[0], packed[1] = seeds.view(np.int64), positions
    numbers = packed[2:].view(np.float32).reshape(4, -1)
    numbers[0], numbers[1], numbers[2] = temperature, top_p, min_p
    numbers[3].view(np.int32)[:] = top_k
    whole = to_device(packed, logits.device)
    floats = whole[2:].view(torch.float32).view(4, -1)
    return choose(logits, Choices(floats[0], floats[3].view(torch.int32), floats[1], floats[2], whole[0], whole[1]))


# Steps differ in their number of rows, and so in where the rows' settings lie: nothing is compiled for that.
_VARIES = ["rows"]
_ANYWHERE = ["temperatures", "top_ks", "top_ps", "min_ps", "seeds", "positions"]


@triton.jit
def _load(logits, row, column, temperature, V: tl.constexpr):
    """Logits over temperature; NaN counts as infinitely large, so that it is found."""
    x = tl.load(logits + row * V + column, mask=column < V, other=float("-inf"))
    x = tl.where(x != x, float("inf"), x)
    return x / tl.where(temperature > 0, temperature, 1.0)


@triton.jit(do_not_specialize=_VARIES, do_not_specialize_on_alignment=_ANYWHERE)
def _summarise(logits, temperatures, summary, rows, V: tl.constexpr, PIECE: tl.constexpr):
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x = _load(logits, row, piece * PIECE + tl.arange(0, PIECE), tl.load(temperatures + row), V)
    most = tl.max(x, 0)
    finite = tl.where(tl.abs(most) < float("inf"), most, 0.0)
    place = summary + row * tl.num_programs(1) + piece
    tl.store(place, most)
    tl.store(place + rows * tl.num_programs(1), tl.sum(tl.exp(x - finite), 0))


@triton.jit
def _mix(x):
    """The finaliser of SplitMix64; see runner/uniform.py."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _uniforms(seed, position, attempt):
    """Two numbers in [0, 1) for this seed, position and draw."""
    counter = position.to(tl.uint64) + (attempt.to(tl.uint64) << 40) + 1
    word = _mix(_mix(seed.to(tl.uint64, bitcast=True)) + counter * 0x9E3779B97F4A7C15)
    scale = 1.0 / 16777216.0
    return (word >> 40).to(tl.float32) * scale, ((word >> 8) & 0xFFFFFF).to(tl.float32) * scale


@triton.jit
def _key(x):
    """int64 that is ordered as the float32 x: 0 .. 2**32 - 1."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -bits - 1, bits + 0x80000000).to(tl.int64)


@triton.jit
def _weights(x, most, least_key, least_weight):
    """exp(x - most) of what is kept: keys from ``least_key`` on, weights from ``least_weight`` on."""
    weight = tl.exp(x - most)
    return tl.where((_key(x) >= least_key) & (weight >= least_weight), weight, 0.0)


@triton.jit
def _kth_key(logits, row, temperature, k, V: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """The key of the k-th largest number of a row: 8 bits in each pass, among those whose higher bits agree."""
    prefix = tl.zeros([], tl.int64)
    left = k
    digits = tl.arange(0, 512)
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        counts = tl.zeros([512], tl.int32)
        for piece in range(PIECES):
            column = piece * PIECE + tl.arange(0, PIECE)
            key = _key(_load(logits, row, column, temperature, V))
            digit = ((key >> shift) & 255).to(tl.int32)
            agrees = ((key >> (shift + 8)) == (prefix >> (shift + 8))) & (column < V)
            counts += tl.histogram(tl.where(agrees, digit, 511), 512)  # 511: of no interest
        counts = tl.where(digits < 256, counts, 0)
        above = tl.sum(counts, 0) - tl.cumsum(counts, 0)  # how many have a larger digit
        found = tl.max(tl.where((above < left) & (above + counts >= left), digits, 0), 0)
        left -= tl.sum(tl.where(digits == found, above, 0), 0)
        prefix += found.to(tl.int64) << shift
    return prefix


@triton.jit
def _draw_in_piece(x, most, least_key, least_weight, uniform, first, PIECE: tl.constexpr):
    """Draw a column of one piece that has weight; returns the column and its key."""
    weight = _weights(x, most, least_key, least_weight)
    offset = tl.arange(0, PIECE)
    reached = tl.cumsum(weight, 0)
    wanted = tl.sum((reached <= uniform * tl.sum(weight, 0)).to(tl.int32), 0)
    # Sums round: what is found must have weight. The next that has any, or else the last.
    column = tl.min(tl.where((weight > 0) & (offset >= wanted), offset, PIECE), 0)
    last = tl.max(tl.where(weight > 0, offset, 0), 0)
    column = tl.where(column == PIECE, last, column)
    return first + column, tl.sum(tl.where(offset == column, _key(x), 0), 0)


@triton.jit(do_not_specialize=_VARIES, do_not_specialize_on_alignment=_ANYWHERE)
def _choose(
    logits, summary, temperatures, top_ks, top_ps, min_ps, seeds, positions, tokens, rows,
    V: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, PIECES_PAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, PIECES_PAD)
    inside = piece < PIECES
    offset = tl.arange(0, PIECE)
    maxima = tl.load(summary + row * PIECES + piece, mask=inside, other=float("-inf"))
    sums = tl.load(summary + (rows + row) * PIECES + piece, mask=inside, other=0.0)
    most = tl.max(maxima, 0)
    temperature = tl.load(temperatures + row)
    if (temperature <= 0) | (tl.abs(most) == float("inf")):
        best = tl.min(tl.where((maxima == most) & inside, piece, PIECES_PAD), 0)
        x = _load(logits, row, best * PIECE + offset, temperature, V)
        tl.store(tokens + row, (best * PIECE + tl.min(tl.where(x == most, offset, PIECE), 0)).to(tl.int64))
        return
    seed, position = tl.load(seeds + row), tl.load(positions + row)
    k, top_p, least_weight = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
    least_key = tl.zeros([], tl.int64)
    if (k > 0) & (k < V):
        least_key = _kth_key(logits, row, temperature, k, V, PIECE, PIECES)
    sums = tl.where(maxima > float("-inf"), sums * tl.exp(maxima - most), 0.0)
    limited = (least_key > 0) | (least_weight > 0)
    limit = float("inf")
    attempt = tl.zeros([], tl.int32)
    undecided = True
    while undecided:
        if limited:  # the weights of the pieces are others now
            for number in range(PIECES):
                x = _load(logits, row, number * PIECE + offset, temperature, V)
                weight = tl.sum(_weights(x, most, least_key, least_weight), 0)
                sums = tl.where(piece == number, weight, sums)
        total = tl.sum(sums, 0)
        if attempt == 0:
            limit = tl.where(top_p < 1.0, top_p * total, float("inf"))
        uniform, second = _uniforms(seed, position, attempt)
        reached = tl.cumsum(sums, 0)
        wanted = tl.sum(((reached <= uniform * total) & inside).to(tl.int32), 0)
        chosen = tl.min(tl.where((sums > 0) & (piece >= wanted), piece, PIECES_PAD), 0)
        chosen = tl.where(chosen == PIECES_PAD, tl.max(tl.where(sums > 0, piece, 0), 0), chosen)
        x = _load(logits, row, chosen * PIECE + offset, temperature, V)
        token, key = _draw_in_piece(x, most, least_key, least_weight, second, chosen * PIECE, PIECE)
        tl.store(tokens + row, token.to(tl.int64))
        undecided = False
        if limit < float("inf"):
            above = 0.0
            for number in range(PIECES):
                x = _load(logits, row, number * PIECE + offset, temperature, V)
                above += tl.sum(_weights(x, most, key + 1, least_weight), 0)
            undecided = (above >= limit) & (above > 0)
            least_key = key + 1
            limited = True
            attempt += 1
