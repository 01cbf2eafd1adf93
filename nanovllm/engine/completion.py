"""One output of a request while it grows: its tokens, text, log-probabilities, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm.engine.input import EngineInput
from nanovllm.engine.logprobs import position_logprobs
from nanovllm.engine.plan import EngineOutput, TokenLogprobs
from nanovllm.engine.stop_strings import StopStrings
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.outputs import CompletionOutput, PositionLogprobs
from nanovllm.sampling_params import RequestOutputKind


class Completion:
    """Collects what the engine says of one output and hands it out as `CompletionOutput`.

    ``token_ids``, ``parts`` and ``logprobs`` hold the whole output so far; with DELTA, what was not handed out yet.

    Attributes:
        token_ids: the tokens.
        num_tokens: tokens generated so far (while `quiet`, counted at the end).
        finish_reason: set once the output has ended; nothing may be added then.
        quiet: until it ends, nothing is to be done with new tokens but to append them to ``token_ids``.
    """

    __slots__ = (
        "_cumulative_logprob",
        "_delta",
        "_detokenizer",
        "_drop_ending",
        "_end_handed_out",
        "_index",
        "_lazy",
        "_logprobs",
        "_min_tokens",
        "_num_handed_out",
        "_num_named",
        "_parts",
        "_stop_strings",
        "_tokenizer",
        "finish_reason",
        "num_tokens",
        "quiet",
        "stop_reason",
        "token_ids",
    )

    def __init__(
        self, index: int, engine_input: EngineInput, tokenizer: Tokenizer | None, kind: RequestOutputKind
    ) -> None:
        params = engine_input.params
        self._index = index
        self._tokenizer = tokenizer
        self._detokenizer = None
        self._stop_strings = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = tokenizer.detokenizer(
                engine_input.prompt_token_ids, params.skip_special_tokens, params.spaces_between_special_tokens
            )
            if params.stop:
                self._stop_strings = StopStrings(params.stop, params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._num_named = len(params.logprob_token_ids or ())
        self._drop_ending = not params.include_stop_str_in_output
        self._delta = kind is RequestOutputKind.DELTA
        # Nobody reads the text before the end, so it is made there.
        self._lazy = kind is RequestOutputKind.FINAL_ONLY and self._stop_strings is None
        self.quiet = self._lazy and params.logprobs is None
        self.token_ids: list[int] = []
        self.num_tokens = 0
        self._parts: list[str] = []
        self._logprobs: list[PositionLogprobs] | None = None if params.logprobs is None else []
        self._cumulative_logprob = 0.0
        self._num_handed_out = 0
        self._end_handed_out = False
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def has_news(self) -> bool:
        """Whether there is anything that was not handed out."""
        return self.num_tokens > self._num_handed_out or (self.finish_reason is not None and not self._end_handed_out)

    def is_due(self, interval: int) -> bool:
        """Whether to hand out now: the first token and the end at once, what is between every ``interval`` tokens."""
        new = self.num_tokens - self._num_handed_out
        if new >= interval or (new and not self._num_handed_out):
            return True
        return self.finish_reason is not None and not self._end_handed_out

    def take(self, output: EngineOutput) -> None:
        """Add what a step gave. A stop string in the new text ends the output, whatever the engine said."""
        new = output.new_token_ids
        if not self._lazy and self._detokenizer is not None:
            shown = new[:-1] if self._ending_is_dropped(output.finish_reason) else new
            if self._stop_strings is None:
                for token_id in shown:
                    self._parts.append(self._detokenizer.push(token_id))
            else:
                new = new[: self._find_stop(shown, len(new))]
        if self._logprobs is not None and output.logprobs:
            self._add_logprobs(output.logprobs[: len(new)])
        self.token_ids += new
        self.num_tokens += len(new)
        if self.finish_reason is None and output.finish_reason is not None:
            self.finish(output.finish_reason, output.stop_reason)

    def finish(self, finish_reason: str, stop_reason: int | str | None = None) -> None:
        """End the output, and make the text that was still to come."""
        self.finish_reason, self.stop_reason = finish_reason, stop_reason
        if self.quiet:
            self.num_tokens = len(self.token_ids)
        if self._detokenizer is None:
            return
        if self._lazy:
            shown = self.token_ids[:-1] if self._ending_is_dropped(finish_reason) else self.token_ids
            self._parts.append(self._detokenizer.push_all(shown))
        text = self._detokenizer.flush()
        if self._stop_strings is None:
            self._parts.append(text)
        elif not self._stopped_by(text, self.num_tokens):
            self._parts.append(self._stop_strings.flush())

    def hand_out(self) -> CompletionOutput:
        """The output so far; with DELTA, what is new."""
        text = "".join(self._parts)
        token_ids, logprobs = self.token_ids, self._logprobs
        self._num_handed_out = self.num_tokens
        self._end_handed_out = self.finish_reason is not None
        if self._delta:
            self.token_ids, self._parts = [], []
            self._logprobs = None if logprobs is None else []
        elif self.finish_reason is None:  # it goes on growing, and the output must not
            self._parts = [text]
            token_ids = token_ids.copy()
            logprobs = None if logprobs is None else logprobs.copy()
        return CompletionOutput(
            self._index,
            text,
            token_ids,
            None if logprobs is None else self._cumulative_logprob,
            logprobs,
            self.finish_reason,
            self.stop_reason,
        )

    def _ending_is_dropped(self, finish_reason: str | None) -> bool:
        """Whether the last token is an EOS or a stop id whose text is not to be shown."""
        return finish_reason == "stop" and self._drop_ending

    def _find_stop(self, shown: Sequence[int], num_new: int) -> int:
        """Turn tokens into text; returns how many of the new tokens count: none after a stop string."""
        assert self._detokenizer is not None
        for count, token_id in enumerate(shown, 1):
            if self._stopped_by(self._detokenizer.push(token_id), self.num_tokens + count):
                return count
        return num_new

    def _stopped_by(self, text: str, num_tokens: int) -> bool:
        """Add text that the token number ``num_tokens`` completed; whether it completed a stop string."""
        assert self._stop_strings is not None
        released, stop = self._stop_strings.push(text, check=num_tokens > self._min_tokens)
        self._parts.append(released)
        if stop is not None:
            self.finish_reason, self.stop_reason = "stop", stop
        return stop is not None

    def _add_logprobs(self, positions: list[TokenLogprobs]) -> None:
        assert self._logprobs is not None
        for position in positions:
            self._logprobs.append(position_logprobs(position, self._tokenizer, self._num_named))
            self._cumulative_logprob += float(position.logprobs[0])
