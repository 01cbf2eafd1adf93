"""Answers as they are shown: streamed to standard output piece by piece, and what is known of each afterwards."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

from nanovllm.entrypoints.cli.lines import say


@dataclass(slots=True)
class Piece:
    """What is new of an answer.

    Attributes:
        text: may be empty.
        num_tokens: tokens that are new.
        finish_reason: why the answer ends with this piece; None if it goes on.
        thought: reasoning before the answer, which is not part of it.
        num_prompt_tokens, num_cached_tokens: of the prompt; None if not known (yet).
        total_tokens: tokens of the whole answer, from one who counts better than by pieces.
    """

    text: str = ""
    num_tokens: int = 0
    finish_reason: str | None = None
    thought: str = ""
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    total_tokens: int | None = None


Pieces = Generator[Piece, None, None]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that was shown.

    Attributes:
        text: all of it.
        finish_reason: None if it was stopped.
    """

    text: str
    finish_reason: str | None


def show(
    pieces: Pieces,
    *,
    stats: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
    stop_on_interrupt: bool = False,
) -> Answer:
    """Write an answer to standard output, and a word on standard error if it was stopped.

    Args:
        stats: say how fast it was, on standard error.
        interrupted: asked after every piece; True stops the answer.
        stop_on_interrupt: `KeyboardInterrupt` stops the answer, too, instead of being raised.
    """
    start = time.perf_counter()
    text, finish_reason, thinking = "", None, False
    arrivals: list[float] = []
    known = Piece()
    try:
        with closing(pieces):
            for piece in pieces:
                arrivals += [time.perf_counter()] * piece.num_tokens
                for name in ("num_prompt_tokens", "num_cached_tokens", "total_tokens"):
                    if getattr(piece, name) is not None:
                        setattr(known, name, getattr(piece, name))
                if piece.finish_reason is not None:
                    finish_reason = piece.finish_reason
                if piece.thought:
                    thinking = True
                    sys.stderr.write(piece.thought)
                    sys.stderr.flush()
                if thinking and piece.text:
                    thinking = False
                    say("")
                text += piece.text
                sys.stdout.write(piece.text)
                sys.stdout.flush()
                if interrupted():
                    break
    except KeyboardInterrupt:
        if not stop_on_interrupt:
            raise
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
    if finish_reason is None:
        say("(stopped)")
    if stats and arrivals:
        say(_speed(start, arrivals, known))
    return Answer(text, finish_reason)


def _speed(start: float, arrivals: list[float], known: Piece) -> str:
    """One line about an answer, from the times its tokens arrived."""
    first, last = arrivals[0], arrivals[-1]
    count = known.total_tokens or len(arrivals)
    rate = f"{(count - 1) / (last - first):.1f} tokens/s, " if last > first else ""
    line = f"{rate}TTFT {first - start:.3f} s, {count} tokens"
    if known.num_prompt_tokens is not None:
        line += f"; prompt {known.num_prompt_tokens} tokens"
        if known.num_cached_tokens is not None:
            line += f", {known.num_cached_tokens} from the cache"
    return f"[{line}]"
