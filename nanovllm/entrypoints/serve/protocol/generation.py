"""Fields that completions and chat completions share, and how they become `SamplingParams`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nanovllm.errors import ParameterError
from nanovllm.sampling_params import RepetitionDetectionParams, SamplingParams, StructuredOutputsParams

INT64 = 2**63 - 1

# Fields of vLLM's that need what this version does not have: refused unless they say nothing.
WITHOUT_ENGINE = {
    "prompt_embeds": "prompts are text or token ids",
    "logits_processors": "use logit_bias, bad_words, allowed_token_ids or structured_outputs",
    "kv_transfer_params": "the KV cache of a request stays in this server",
    "vllm_xargs": "there are no sampling extensions",
    "mm_processor_kwargs": "the model reads text only",
    "media_io_kwargs": "the model reads text only",
    "return_routed_experts": "the model has no experts",
}


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = ConfigDict(extra="allow")
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class JsonSchemaFormat(BaseModel):
    """The schema an answer follows."""

    model_config = ConfigDict(extra="allow")
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of an answer."""

    model_config = ConfigDict(extra="allow")
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(BaseModel):
    """A constraint on the form of the output; the fields are those of `StructuredOutputsParams`."""

    model_config = ConfigDict(extra="forbid")
    json_: str | dict[str, Any] | bool | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    disable_fallback: bool | None = None
    backend: str | None = None


class RepetitionDetection(BaseModel):
    """When an output counts as a loop and ends; the fields are those of `RepetitionDetectionParams`."""

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0


class GenerationRequest(BaseModel):
    """What both kinds of request may hold. None means: the model's default, or else OpenAI's."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: Annotated[int, Field(ge=-INT64 - 1, le=INT64)] | None = None
    user: str | None = None
    # vLLM's own
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=INT64)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    use_beam_search: bool = False
    length_penalty: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    guided_decoding_backend: str | None = None
    priority: Annotated[int, Field(ge=-INT64 - 1, le=INT64)] = 0
    request_id: str | None = None
    session_id: str | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    thinking_token_budget: int | None = None
    repetition_detection: RepetitionDetection | None = None
    stream_interval: int | None = None
    best_of: int | None = None

    def refuse_unsupported(self) -> None:
        """Raises ParameterError for a field this version cannot honour."""
        for name, remedy in WITHOUT_ENGINE.items():
            value = (self.model_extra or {}).get(name)
            if value:
                raise ParameterError(f"{name} is not supported by this version: {remedy}", name, value)
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ParameterError(
                f"best_of is no longer supported: ask for n={self.best_of} outputs and choose among them",
                "best_of",
                self.best_of,
            )
        if self.stream_options is not None and not self.stream:
            raise ParameterError("Stream options can only be defined when `stream=True`.", "stream_options", "...")
        if self.stream and self.prompt_logprobs is not None:
            raise ParameterError(
                "`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs", self.prompt_logprobs
            )
        if self.stream and self.use_beam_search:
            raise ParameterError("Streaming is not currently supported with beam search", "use_beam_search", True)
        if self.use_beam_search:
            self._check_beam_search()
        if self.cache_salt is not None and not self.cache_salt:
            raise ParameterError("must be a non-empty string if it is given", "cache_salt", self.cache_salt)

    def _check_beam_search(self) -> None:
        """A beam search has a width, a length and a length penalty; it ranks by the model's own probabilities."""
        if self.temperature not in (None, 0, 1):
            raise ParameterError("beam search ranks by the model's own probabilities: use 0", "temperature",
                                 self.temperature)  # fmt: skip
        for name in _NOT_IN_BEAM_SEARCH:
            if getattr(self, name):
                raise ParameterError("not supported with beam search", name, getattr(self, name))

    def unknown_fields(self) -> dict[str, Any]:
        """Fields that no version of the interface has."""
        return {name: value for name, value in (self.model_extra or {}).items() if name not in WITHOUT_ENGINE}

    def usage_wanted(self, forced: bool) -> tuple[bool, bool]:
        """Whether a stream ends with its usage, and whether each chunk carries it."""
        options = self.stream_options
        if options is None:
            return forced, False
        last = bool(options.include_usage) or forced
        return last, last and bool(options.continuous_usage_stats)

    def sampling_params(
        self,
        defaults: dict[str, Any],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
        **others: Any,
    ) -> SamplingParams:
        """How to sample: what the request sets, else the model's defaults, else OpenAI's.

        Args:
            defaults: the model's (generation_config.json).
            max_tokens, logprobs, prompt_logprobs: as the endpoint understands them.
            **others: further fields.

        Raises:
            ParameterError: a value out of range.
        """
        if self.logprob_token_ids is not None and logprobs is None:
            raise ParameterError("has its place in logprobs: ask for them", "logprob_token_ids", self.logprob_token_ids)
        fields: dict[str, Any] = {name: value for name, value in defaults.items() if name != "max_tokens"}
        for name in _SAME_NAME:
            value = getattr(self, name)
            if value is not None:
                fields[name] = value
        if self.use_beam_search:
            fields["temperature"] = 1.0  # n outputs differ
        detection = self.repetition_detection
        return SamplingParams(
            **fields,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            structured_outputs=self.constraint(),
            repetition_detection=None if detection is None else RepetitionDetectionParams(**detection.model_dump()),
            **others,
        )

    def constraint(self) -> StructuredOutputsParams | None:
        """The constraint on the output's form, from whichever of its three places.

        Raises:
            ParameterError: more than one, or an incomplete one.
        """
        found: list[tuple[str, dict[str, Any]]] = []
        format_fields = self._format_fields()
        if format_fields:
            found.append(("response_format", format_fields))
        if self.structured_outputs is not None:
            given = self.structured_outputs.model_dump(by_alias=True, exclude_none=True)
            given.pop("disable_fallback", None)  # there is one backend
            given.pop("backend", None)
            for name in ("structural_tag", "json"):
                if isinstance(given.get(name), bool) or (
                    name == "structural_tag" and isinstance(given.get(name), dict)
                ):
                    given[name] = json.dumps(given[name])
            if given.get("json_object") is False:
                del given["json_object"]
            found.append(("structured_outputs", given))
        old = {name: getattr(self, f"guided_{name}") for name in ("json", "regex", "choice", "grammar")}
        old = {name: value for name, value in old.items() if value is not None}
        if old:
            if self.guided_whitespace_pattern is not None:
                old["whitespace_pattern"] = self.guided_whitespace_pattern
            found.append(("guided_" + next(iter(old)), old))
        if len(found) > 1:
            names = " and ".join(name for name, _ in found)
            raise ParameterError(f"give one constraint on the output, not {names}", found[-1][0], "...")
        return StructuredOutputsParams(**found[0][1]) if found else None

    def _format_fields(self) -> dict[str, Any]:
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return {}
        if wanted.type == "json_object":
            return {"json_object": True}
        if wanted.type == "structural_tag":
            return {"structural_tag": json.dumps(wanted.model_dump(by_alias=True, exclude_none=True))}
        if wanted.json_schema is None or wanted.json_schema.json_schema is None:
            raise ParameterError(
                "a response_format of type 'json_schema' needs json_schema.schema", "response_format", "json_schema"
            )
        schema = wanted.json_schema.json_schema
        return {"json": json.dumps(schema) if isinstance(schema, bool) else schema}


_NOT_IN_BEAM_SEARCH = (
    "stop",
    "stop_token_ids",
    "min_tokens",
    "logit_bias",
    "bad_words",
    "allowed_token_ids",
    "presence_penalty",
    "frequency_penalty",
    "prompt_logprobs",
    "logprob_token_ids",
    "thinking_token_budget",
    "repetition_detection",
)
_SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "bad_words",
    "allowed_token_ids",
    "logit_bias",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "logprob_token_ids",
    "thinking_token_budget",
    "stream_interval",
)
