"""Random numbers that depend on nothing but (seed, position): no generator, no state, no order of draws.

So a request draws the same numbers whatever else is in its batch, and again when it is recomputed after preemption.
"""

from __future__ import annotations

import numpy as np

from nanovllm.runner.ragged import Array

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd: the step of SplitMix64's counter


def _mix(x: Array) -> Array:
    """The finaliser of SplitMix64: a bijection of 64-bit words in which every input bit stirs every output bit.

    Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014 (variant 13 of Stafford).
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: Array, positions: Array, attempt: int = 0) -> Array:
    """Two independent uniform numbers in [0, 1) for every row: float32 [n, 2].

    ``seeds`` uint64 [n], ``positions`` int64 [n] below 2**40. ``attempt`` counts further draws for the same token.
    Word number ``position`` of the SplitMix64 stream of the (mixed) seed; each half gives 24 bits.
    """
    counter = positions.astype(np.uint64) + np.uint64((attempt << 40) + 1)
    word = _mix(_mix(seeds) + counter * _GOLDEN)
    halves = np.stack([word >> np.uint64(40), (word >> np.uint64(8)) & np.uint64(0xFFFFFF)], axis=1)
    return halves.astype(np.float32) * np.float32(2.0**-24)
