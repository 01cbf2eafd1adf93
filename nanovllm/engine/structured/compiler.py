"""Grammars compiled for one model's tokens, each once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import ParameterError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from nanovllm.config import ModelConfig

MAX_KEPT = 256  # compiled grammars; the one used longest ago is forgotten
MAX_LEXER_STATES = 50_000  # of a request, 1 to 2 kB each; one that needs more ends with an error


class GrammarError(ValueError):
    """A grammar that cannot be compiled."""


class GrammarCompiler:
    """Compiles grammars, and keeps them. Any thread may call it.

    The model's tokens are read when the first grammar comes: about a second for a vocabulary of 152k.

    Args:
        model: whose tokenizer it is.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        self._tokenizer: Tokenizer | None = None
        self._tokens: LLTokenizer | None = None
        self._jobs: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._lock = threading.Lock()  # of the jobs
        self._loading = threading.Lock()

    def use(self, tokenizer: Tokenizer | None) -> None:
        """Take a tokenizer that has been loaded already, so that it is not loaded again."""
        self._tokenizer = tokenizer

    def load(self) -> LLTokenizer:
        """The model's tokens. Called early, it takes the wait off the first constrained request.

        Raises:
            ParameterError: the model has no tokenizer, or none that can be used.
        """
        with self._loading:
            if self._tokens is None:
                self._tokens = self._load()
            return self._tokens

    def matcher(self, grammar: str) -> LLMatcher:
        """A matcher at the start of the grammar, the caller's own.

        Raises:
            GrammarError: it cannot be compiled.
            ParameterError: the model has no tokenizer, or none that can be used.
        """
        with self._lock:
            job = self._jobs.get(grammar)
            mine = job is None
            if job is None:
                job = self._jobs[grammar] = Future()
                while len(self._jobs) > MAX_KEPT:
                    self._jobs.popitem(last=False)
            self._jobs.move_to_end(grammar)
        if mine:
            try:
                job.set_result(self._compile(grammar))
            except BaseException as error:
                job.set_exception(error)
                with self._lock:
                    self._jobs.pop(grammar, None)
        return job.result().deep_copy()

    def prepare(self, grammar: str | None) -> None:
        """Begin to compile a grammar, if there is one; `matcher` will need it soon."""
        with self._lock:
            if grammar is None or grammar in self._jobs:
                return
        threading.Thread(target=self._try, args=(grammar,), name="nanovllm-grammar", daemon=True).start()

    def check(self, kind: str, grammar: str) -> None:
        """Raises ParameterError, with the parameter ``structured_outputs`` and the kind, if it cannot be compiled."""
        try:
            self.matcher(grammar)
        except GrammarError as error:
            name = f"structured_outputs.{kind}"
            raise ParameterError(f"{name} cannot be honoured: {error}", name, "...") from None

    def _try(self, grammar: str) -> None:
        with suppress(Exception):  # it will be raised where it is waited for
            self.matcher(grammar)

    def _compile(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        matcher = LLMatcher(self.load(), grammar, log_level=0, limits=limits)
        first = matcher.deep_copy()
        first.compute_bitmask()  # finds what the compiler does not: a grammar that lets nothing begin
        if first.is_error():
            reason = first.get_error().removesuffix("<non-verbose/>").strip()
            raise GrammarError("it lets no output begin" if reason.startswith("NoExtension") else reason)
        return matcher

    def _load(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        model, tokenizer = self._model, self._tokenizer
        if tokenizer is None and model.tokenizer is not None:
            tokenizer = Tokenizer.load(
                model.tokenizer, mode=model.tokenizer_mode, trust_remote_code=model.trust_remote_code
            )
        backend: Any = getattr(tokenizer, "backend", None)
        if tokenizer is None or backend is None:
            missing = "skip_tokenizer_init is set" if tokenizer is None else "this model's runs in Python only"
            raise ParameterError(f"a fast tokenizer is needed, and {missing}", "structured_outputs", None)
        ending = {token for token in (*model.eos_token_ids, tokenizer.eos_token_id) if token is not None}
        if not ending:
            raise ParameterError("the model has no token that ends an output", "structured_outputs", None)
        # Ids behind the tokenizer's own are padding of the embedding: never allowed.
        size = max(model.vocab_size, len(tokenizer), max(ending) + 1)
        try:
            return LLTokenizer(backend.to_str(), n_vocab=size, eos_token=sorted(ending))
        except ValueError as error:
            raise ParameterError(f"this tokenizer cannot be constrained: {error}", "structured_outputs", None) from None
