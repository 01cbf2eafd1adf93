"""What the next tokens of a step's requests may be: the masks of their grammars, in the form they are used in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nanovllm.engine.structured.compiler import GrammarCompiler
from nanovllm.engine.structured.guide import Guide, GuideSpec

if TYPE_CHECKING:
    from llguidance import LLExecutor

Array = np.ndarray[Any, Any]

NO_TOKEN = "no token satisfies both the grammar and the request's other rules (allowed_token_ids, bad_words)"


def _no_places() -> Array:
    return np.zeros(0, np.int64)


@dataclass(slots=True)
class Limits:
    """Limits on the tokens of one step; an index counts the step's sampled rows, a place is index * vocabulary + token.

    A row has the shorter of two lists: of the tokens that may come, or of those that may not. Rows that are not named
    have no limits.

    Attributes:
        closed: int64, indexes of the rows in which nothing may come but ``allowed``.
        allowed, banned: int64, places.
        forced: int64, those of the places in ``allowed`` that are the only ones of their row.
        complete: indexes of rows whose output ends with this token.
        free: indexes of rows that will never have limits again.
        failed: indexes of rows for which nothing can be said, and why.
        masks: by index, a bit for each token that may come: uint32 [vocabulary / 32].
    """

    closed: Array = field(default_factory=_no_places)
    allowed: Array = field(default_factory=_no_places)
    banned: Array = field(default_factory=_no_places)
    forced: Array = field(default_factory=_no_places)
    complete: list[int] = field(default_factory=list)
    free: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    masks: dict[int, Array] = field(default_factory=dict)

    def judge(self, token_ids: Sequence[int]) -> dict[int, str]:
        """Rows whose request has to end with an error: those that failed, and those whose token may not come."""
        failed = dict(self.failed)
        for index, words in self.masks.items():
            token = token_ids[index]
            if not int(words[token >> 5]) >> (token & 31) & 1:
                failed[index] = NO_TOKEN
        return failed


class Limiter:
    """Computes limits, with threads of its own that sleep in between.

    Args:
        compiler: that the guides' grammars came from.
        vocab_size: tokens there are logits for.
    """

    def __init__(self, compiler: GrammarCompiler, vocab_size: int) -> None:
        self._compiler = compiler
        self._vocab_size = vocab_size
        self._threads: LLExecutor | None = None

    def limits(self, guides: Sequence[tuple[int, Guide]]) -> Limits:
        """The limits of the next token of every request: (index among the step's sampled rows, its guide)."""
        limits = Limits()
        allowed: dict[int, Array] = {}
        banned: dict[int, Array] = {}
        forced: list[int] = []
        masked = []
        for index, guide in guides:
            if guide.error is not None:
                limits.failed[index] = guide.error
            elif (token := guide.forced) is not None:
                allowed[index] = np.array([token])
                forced.append(index * self._vocab_size + token)
                if guide.complete:
                    limits.complete.append(index)
            elif guide.thinking:
                if guide.spec.think_never:
                    banned[index] = np.array(guide.spec.think_never)
            elif guide.matcher is not None:
                masked.append((index, guide))
            else:
                limits.free.append(index)
        if masked:
            self._fill_masks(limits, masked)
        for index, mask in limits.masks.items():
            bits = np.unpackbits(mask.view(np.uint8), count=self._vocab_size, bitorder="little")
            if 2 * int(np.count_nonzero(bits)) <= self._vocab_size:
                allowed[index] = np.flatnonzero(bits)
            else:
                banned[index] = np.flatnonzero(bits == 0)
        limits.closed = np.array(list(allowed), np.int64)
        limits.allowed, limits.banned = self._places(allowed), self._places(banned)
        limits.forced = np.array(forced, np.int64)
        return limits

    def _fill_masks(self, limits: Limits, guides: list[tuple[int, Guide]]) -> None:
        from llguidance import LLExecutor
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

        if self._threads is None:
            self._threads = LLExecutor(max(1, min(8, (os.cpu_count() or 2) // 2)))
        words = allocate_token_bitmask(len(guides), self._compiler.load().vocab_size)
        matchers: list[Any] = [(guide.matcher, row) for row, (_, guide) in enumerate(guides)]
        fill_next_token_bitmask_par(self._threads, matchers, words)
        for (index, guide), (matcher, _), mask in zip(guides, matchers, words.view(np.uint32), strict=True):
            if matcher.is_error():
                guide.error = limits.failed[index] = f"the grammar cannot go on: {matcher.get_error()}"
            else:
                _allow_ending(mask, guide.spec)
                limits.masks[index] = mask

    def _places(self, ids: dict[int, Array]) -> Array:
        parts = [index * self._vocab_size + tokens for index, tokens in ids.items()]
        return np.concatenate(parts) if parts else _no_places()


def _allow_ending(mask: Array, spec: GuideSpec) -> None:
    """Where the grammar accepts, every end id may come, or, if the output is to go on, none: something else may."""
    ids = np.array(spec.end_ids)
    words, bits = ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32)
    if mask[words[0]] & bits[0]:
        if spec.to_the_end:
            np.bitwise_and.at(mask, words, ~bits)
        else:
            np.bitwise_or.at(mask, words, bits)
