"""What one request's next token may be: the state between its tokens, first of its reasoning, then of its grammar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from nanovllm.engine.structured.compiler import GrammarCompiler


@dataclass(frozen=True, slots=True)
class GuideSpec:
    """A request's constraint as plain data; it may travel between processes.

    Attributes:
        grammar: text for `GrammarCompiler.matcher`; None limits the reasoning only.
        end_ids: tokens that may end the output once the grammar accepts it, EOS first.
        to_the_end: the output ends only where the grammar lets nothing follow (``ignore_eos``).
        think_end: tokens that end the reasoning; empty if the output begins with the answer.
        think_start: tokens that begin it; at the start of an output they do not count as reasoning.
        think_never: tokens that may not come in it.
        think_budget: most tokens of reasoning; None: no limit.
    """

    grammar: str | None = None
    end_ids: tuple[int, ...] = ()
    to_the_end: bool = False
    think_end: tuple[int, ...] = ()
    think_start: tuple[int, ...] = ()
    think_never: tuple[int, ...] = ()
    think_budget: int | None = None


class Guide:
    """Follows a request token by token.

    ::

        thinking --end marker--> grammar --end id--> the output has ended
                                    |
                                    +--a token the grammar does not allow--> error

    Attributes:
        spec: what it follows.
        matcher: the grammar's state; None without a grammar.
        thinking: the end of the reasoning has not come yet.
        error: why nothing can be said of the next token any more; None while all is well.
    """

    __slots__ = ("_count", "_forcing", "_marker", "_opening", "_read", "_tail", "error", "matcher", "spec", "thinking")

    def __init__(self, spec: GuideSpec, compiler: GrammarCompiler, output: Sequence[int] = ()) -> None:
        """``output``: tokens generated so far, by this request or (beam search) by those it continues."""
        self.spec = spec
        self.matcher: LLMatcher | None = None
        self.thinking = bool(spec.think_end)
        self.error: str | None = None
        try:
            if spec.grammar is not None:
                self.matcher = compiler.matcher(spec.grammar)
        except ValueError as error:  # it was tried before, but perhaps in another process
            self.error = str(error)
        self._count = 0  # tokens of reasoning
        self._opening = spec.think_start  # what has not come yet of a marker at the start of the output
        self._forcing = 0  # the next token to force of the end marker, from 1; 0: none
        self._tail = b""  # the end of the text
        self._marker = b""
        if len(spec.think_end) > 1:  # several tokens: the same text may come in others
            self._read = compiler.load().decode_bytes
            self._marker = self._read(list(spec.think_end))
        self._check_budget()
        for token in output:
            self.accept(token)

    @property
    def free(self) -> bool:
        """Nothing limits what is still to come."""
        return not self.thinking and self.matcher is None and self.error is None

    @property
    def complete(self) -> bool:
        """Nothing may follow but the end of the output."""
        return not self.thinking and self.error is None and self.matcher is not None and self.matcher.is_stopped()

    @property
    def forced(self) -> int | None:
        """The only token that may come next; None if there may be several."""
        if self.thinking:
            return self.spec.think_end[self._forcing - 1] if self._forcing else None
        return self.spec.end_ids[0] if self.complete else None

    def accept(self, token: int) -> None:
        """The request has generated ``token``."""
        if self.thinking:
            self._think(token)
            return
        if self.matcher is None or self.error is not None or token in self.spec.end_ids:
            return
        if not self.matcher.consume_token(token):
            self.error = f"the grammar cannot go on: {self.matcher.get_error().strip()}"

    def _think(self, token: int) -> None:
        self._count += 1
        if self._forcing:
            self._forcing += 1
        if self._ends_thinking(token):
            self.thinking = False
        elif self._opening and token == self._opening[0]:
            self._opening = self._opening[1:]
            if not self._opening:
                self._count = 0  # the marker is out: what counts begins here
        else:
            self._opening = ()
        self._check_budget()

    def _ends_thinking(self, token: int) -> bool:
        if not self._marker:
            return token == self.spec.think_end[0]
        self._tail = (self._tail + self._read([token]))[-2 * len(self._marker) :]
        return self._marker in self._tail

    def _check_budget(self) -> None:
        budget = self.spec.think_budget
        if self.thinking and budget is not None and self._count >= budget and not self._forcing:
            self._forcing = 1
