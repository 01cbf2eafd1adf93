"""``/v1/completions``."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from nanovllm.entrypoints.serve.protocol.generation import GenerationRequest
from nanovllm.errors import ParameterError
from nanovllm.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionRequest(GenerationRequest):
    """A request to complete one prompt, or several at once."""

    prompt: list[int] | list[list[int]] | str | list[str] | None = Field(
        default=None, examples=["The capital of France is"]
    )
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    logprobs: int | None = None
    echo: bool | None = False
    suffix: str | None = None
    add_special_tokens: bool = True

    @property
    def prompt_only(self) -> bool:
        """Whether nothing is to be generated: the prompt is echoed, and scored if log-probabilities are asked for."""
        return bool(self.echo) and self.max_tokens == 0

    def params(self, defaults: dict[str, Any], **others: Any) -> SamplingParams:
        """How to sample.

        Raises:
            ParameterError: a value out of range.
        """
        self.refuse_unsupported()
        if self.suffix:
            raise ParameterError(
                "suffix is not supported: the model does not fill in the middle", "suffix", self.suffix
            )
        limit = defaults.get("max_tokens")
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        if limit is not None and "max_tokens" not in self.model_fields_set:
            max_tokens = min(max_tokens, limit)
        prompt_logprobs = self.prompt_logprobs
        if prompt_logprobs is None and self.echo:
            prompt_logprobs = self.logprobs
        return self.sampling_params(
            defaults,
            max_tokens=1 if self.prompt_only else max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=prompt_logprobs,
            **others,
        )
