"""From a request's parameters and prompt to its `GuideSpec`, checked so that nothing about it can fail later."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nanovllm.engine.structured.compiler import GrammarCompiler
from nanovllm.engine.structured.grammar import to_grammar
from nanovllm.engine.structured.guide import GuideSpec
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import ParameterError
from nanovllm.parsers import REASONING_PARSERS
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams

if TYPE_CHECKING:
    from nanovllm.config import StructuredOutputsConfig


class GuideBuilder:
    """Makes `GuideSpec`s for one model.

    Args:
        config: defaults of all requests, and the name of the model's reasoning parser.
        tokenizer: the model's, or None.
        compiler: where grammars are tried.
    """

    def __init__(self, config: StructuredOutputsConfig, tokenizer: Tokenizer | None, compiler: GrammarCompiler) -> None:
        self.compiler = compiler
        self._config = config
        self._tokenizer = tokenizer
        self._reasoning = None if config.reasoning_parser is None else REASONING_PARSERS[config.reasoning_parser]

    def build(
        self, params: SamplingParams, prompt: Sequence[int], eos_token_ids: frozenset[int], reasoning_ended: bool
    ) -> GuideSpec | None:
        """What the output must follow; None if that is nothing.

        Args:
            prompt: token ids, in which the reasoning may have been begun or closed.
            eos_token_ids: of the model, whether or not the request ignores them.
            reasoning_ended: the answer begins at once, unless the prompt ends within reasoning.

        Raises:
            ParameterError: the constraint cannot be honoured.
        """
        constraint, budget = params.structured_outputs, params.thinking_token_budget
        if constraint is None and budget is None:
            return None
        spec = GuideSpec()
        if constraint is not None:
            spec = self._grammar(constraint, params, eos_token_ids)
        in_reasoning = constraint is not None and self._config.enable_in_reasoning
        if budget is not None and (self._reasoning is None or in_reasoning):
            raise ParameterError(
                "a budget needs to know where reasoning ends: set reasoning_parser (and not enable_in_reasoning)",
                "thinking_token_budget",
                budget,
            )
        if self._reasoning is not None and not in_reasoning and self._thinks(prompt, not reasoning_ended):
            spec = self._with_reasoning(spec, budget)
        return None if spec == GuideSpec() else spec

    def switched_off(self, variables: Mapping[str, Any]) -> bool:
        """Whether these variables of the chat template tell the model not to reason."""
        switch = None if self._reasoning is None else self._reasoning.switch
        return switch is not None and variables.get(switch) is False

    def _grammar(
        self, constraint: StructuredOutputsParams, params: SamplingParams, eos_token_ids: frozenset[int]
    ) -> GuideSpec:
        if self._config.disable_any_whitespace or self._config.disable_additional_properties:
            constraint = dataclasses.replace(
                constraint,
                disable_any_whitespace=constraint.disable_any_whitespace or self._config.disable_any_whitespace,
                disable_additional_properties=constraint.disable_additional_properties
                or self._config.disable_additional_properties,
            )
        tokenizer = self._need_tokenizer(f"structured_outputs.{constraint.kind}")
        grammar = to_grammar(constraint, self._added_tokens())
        self.compiler.check(constraint.kind, grammar)
        eos = sorted(eos_token_ids, key=lambda token: (token != tokenizer.eos_token_id, token))
        special = set(tokenizer.all_special_ids) - eos_token_ids
        stops = [token for token in params.stop_token_ids or () if token in special]
        return GuideSpec(grammar, (*eos, *stops), to_the_end=params.ignore_eos)

    def _added_tokens(self) -> dict[str, int]:
        backend = getattr(self._tokenizer, "backend", None)  # without one, nothing can be compiled
        added = {} if backend is None else backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items()}

    def _with_reasoning(self, spec: GuideSpec, budget: int | None) -> GuideSpec:
        assert self._reasoning is not None
        never: list[int] = []
        if spec.grammar is not None:  # the answer may not begin before its grammar does
            never = [ids[0] for text in self._reasoning.implicit_ends if len(ids := self._ids(text)) == 1]
        return dataclasses.replace(
            spec,
            think_start=self._ids(self._reasoning.start),
            think_end=self._ids(self._reasoning.end),
            think_never=tuple(never),
            think_budget=budget,
        )

    def _thinks(self, prompt: Sequence[int], expected: bool) -> bool:
        """Whether reasoning comes first: as the prompt's last turn says by its markers, or else as expected."""
        assert self._reasoning is not None
        tokenizer = self._need_tokenizer("thinking_token_budget")
        markers = {*self._ids(self._reasoning.start), *self._ids(self._reasoning.end)}
        special = set(tokenizer.all_special_ids) - markers
        begin = next((i + 1 for i in range(len(prompt) - 1, -1, -1) if prompt[i] in special), 0)
        turn = tokenizer.decode(list(prompt[begin:]), skip_special_tokens=False)
        opened, closed = turn.rfind(self._reasoning.start), turn.rfind(self._reasoning.end)
        return expected if opened == closed else opened > closed

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._need_tokenizer("thinking_token_budget").encode(text, add_special_tokens=False))

    def _need_tokenizer(self, parameter: str) -> Tokenizer:
        if self._tokenizer is None:
            raise ParameterError("needs a tokenizer, and skip_tokenizer_init is set", parameter, "...")
        return self._tokenizer
