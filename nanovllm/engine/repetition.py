"""Detect an output that has begun to repeat itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.sampling_params import RepetitionDetectionParams


def ends_in_repetition(token_ids: list[int], start: int, params: RepetitionDetectionParams) -> bool:
    """Whether ``token_ids[start:]`` ends in a pattern of min..max_pattern_size tokens, min_count times in a row."""
    for size in range(max(params.min_pattern_size, 1), params.max_pattern_size + 1):
        length = size * params.min_count
        if len(token_ids) - start < length:
            break
        tail = token_ids[-length:]
        if tail[size:] == tail[:-size]:
            return True
    return False
