"""Configuration: what a user may set (`EngineArgs`), and what the engine runs on (`EngineConfig`, frozen).

Everything is validated once, here. No torch: the command line builds its flags from `EngineArgs`.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from nanovllm.errors import ParameterError
from nanovllm.hub import DEMO_MODEL, resolve_model_path
from nanovllm.model_files import (
    checkpoint_dtype,
    default_context,
    derived_context,
    positive,
    read_hf_config,
    read_json,
)
from nanovllm.pooling_params import PoolingConfig, override_pooling, read_pooling

logger = logging.getLogger("nanovllm")

# Names of vLLM's past that scripts still pass: taken with a warning that says what became of them.
RETIRED = {
    "swap_space": "preempted requests are recomputed, nothing is swapped",
    "task": "the task follows from the method you call",
    "max_seq_len_to_capture": "graphs are chosen by batch size",
    "use_v2_block_manager": "there is one block manager",
    "num_scheduler_steps": "a step is one forward pass; planning overlaps with it",
    "num_lookahead_slots": "slots grow on demand",
    "preemption_mode": "preemption is always by recompute",
    "disable_async_output_proc": "there is nothing to switch off",
    "disable_custom_all_reduce": "collectives are torch.distributed's",
    "disable_log_requests": "requests are not logged",
    "guided_decoding_backend": "structured output has one backend",
    "worker_use_ray": "use distributed_executor_backend",
    "max_context_len_to_capture": "graphs are chosen by batch size",
}


@dataclass(frozen=True)
class ModelConfig:
    """A checkpoint and how it is read."""

    model: str  # as the user typed it
    path: Path
    hf_config: dict[str, Any]  # config.json after overrides; the text part of a multimodal one
    architecture: str
    dtype: str  # "bfloat16" | "float16" | "float32"
    max_model_len: int  # tokens, prompt and output together
    vocab_size: int
    load_format: str
    quantization: str | None  # what is done to the weights as they are loaded
    seed: int
    tokenizer: Path | None
    tokenizer_mode: str
    skip_tokenizer_init: bool
    trust_remote_code: bool
    chat_template: str | None
    eos_token_ids: tuple[int, ...]
    generation_defaults: dict[str, Any]
    max_logprobs: int
    logprobs_mode: str


@dataclass(frozen=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int
    num_blocks: int | None  # None: sized from memory
    memory_bytes: int | None
    memory_utilization: float
    enable_prefix_caching: bool
    dtype: str


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits and policy of a step."""

    max_num_seqs: int
    max_num_batched_tokens: int
    enable_chunked_prefill: bool
    policy: str  # "fcfs" | "priority"
    long_prefill_token_threshold: int  # most prompt tokens of one request in a step; 0: no limit
    max_steps_in_flight: int  # 1: plan, run, plan ...; 2: plan the next step while one runs


@dataclass(frozen=True)
class StructuredOutputsConfig:
    """Defaults of constrained outputs, and where a model's reasoning ends."""

    reasoning_parser: str | None = None  # a name in nanovllm.parsers.REASONING_PARSERS
    enable_in_reasoning: bool = False  # the constraint holds from the first token on, not from the answer's
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False


@dataclass(frozen=True)
class EngineConfig:
    """All an engine needs to know."""

    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    device: str
    attention_backend: str | None
    seed: int
    enforce_eager: bool
    tensor_parallel_size: int
    log_stats: bool = False  # a line in the log every ten seconds of work
    structured_outputs: StructuredOutputsConfig = StructuredOutputsConfig()
    pooling: PoolingConfig = field(default_factory=PoolingConfig)


# Ours by vLLM's names of attention backends.
_OUR_ATTENTION = {"FLASH_ATTN": "flash_attn", "FLASHINFER": "flashinfer", "TRITON_ATTN": "triton"}


@dataclass
class EngineArgs:
    """What a user may set; names and meaning are vLLM's.

    ``EngineArgs.from_kwargs(**kwargs).build()`` gives the `EngineConfig`.
    """

    model: str = DEMO_MODEL
    tokenizer: str | None = None
    tokenizer_mode: str = "auto"
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    chat_template: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int | None = 0
    max_model_len: int | str | None = None
    revision: str | None = None
    tokenizer_revision: str | None = None
    hf_token: str | bool | None = None
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    download_dir: str | None = None
    use_modelscope: bool | None = None
    load_format: str = "auto"
    quantization: str | None = None
    generation_config: str = "auto"
    override_generation_config: dict[str, Any] = field(default_factory=dict)
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    enforce_eager: bool = False
    attention_backend: str | None = None
    reasoning_parser: str | None = None
    structured_outputs_config: dict[str, Any] = field(default_factory=dict)
    runner: str = "auto"
    convert: str = "auto"
    pooler_config: dict[str, Any] = field(default_factory=dict)
    block_size: int | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    kv_cache_dtype: str = "auto"
    enable_prefix_caching: bool | None = None
    prefix_caching_hash_algo: str = "sha256"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enable_chunked_prefill: bool | None = None
    scheduling_policy: str = "fcfs"
    long_prefill_token_threshold: int = 0
    async_scheduling: bool | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    distributed_executor_backend: str | None = None
    disable_log_stats: bool = False

    def __post_init__(self) -> None:
        for name in ("model", "tokenizer", "download_dir", "chat_template"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                setattr(self, name, os.fspath(value))
        if not isinstance(self.dtype, str):  # a torch dtype
            self.dtype = str(self.dtype)

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineArgs:
        """Build from keyword arguments; retired vLLM names warn, unknown ones raise.

        Raises:
            TypeError: an unknown name; the message offers the nearest known one.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for name in [n for n in kwargs if n not in known]:
            if name not in RETIRED:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"unknown engine argument {name!r}{hint}")
            logger.warning("%s is retired and has no effect: %s.", name, RETIRED[name])
            del kwargs[name]
        return cls(**kwargs)

    def build(self) -> EngineConfig:
        """Validate everything and resolve defaults.

        Raises:
            ParameterError: a value out of range, or not supported by this version.
            ModelError: the model folder is unusable.
        """
        self._check()
        from nanovllm.platforms import get_platform

        platform = get_platform(self.device)
        platform.check_cache_dtype(self.kv_cache_dtype)
        platform.check_quantization(self.quantization)
        platform.check_block_size(self.block_size or platform.block_size)
        path = resolve_model_path(
            self.model,
            revision=self.revision,
            download_dir=self.download_dir,
            hf_token=self.hf_token,
            use_modelscope=self.use_modelscope,
            weights=self.load_format != "dummy",
        )
        hf_config, architecture = read_hf_config(path, self.hf_overrides)
        saved = checkpoint_dtype(hf_config)
        max_model_len = self._max_model_len(hf_config)
        model = ModelConfig(
            model=str(self.model),
            path=path,
            hf_config=hf_config,
            architecture=architecture,
            dtype=platform.resolve_dtype(_dtype_name(self.dtype), saved and _dtype_name(saved)),
            max_model_len=max_model_len,
            vocab_size=positive(hf_config, "vocab_size", path),
            load_format="safetensors" if self.load_format == "auto" else self.load_format,
            quantization=self.quantization,
            seed=self.seed or 0,
            tokenizer=self._tokenizer_path(path),
            tokenizer_mode=self.tokenizer_mode,
            skip_tokenizer_init=self.skip_tokenizer_init,
            trust_remote_code=self.trust_remote_code,
            chat_template=self.chat_template,
            **self._generation(path, hf_config),
            max_logprobs=self.max_logprobs,
            logprobs_mode=self.logprobs_mode,
        )
        return EngineConfig(
            model=model,
            cache=CacheConfig(
                block_size=self.block_size or platform.block_size,
                num_blocks=self.num_gpu_blocks_override,
                memory_bytes=self._cache_bytes(),
                memory_utilization=self.gpu_memory_utilization or platform.memory_utilization,
                enable_prefix_caching=self.enable_prefix_caching is not False,
                dtype=self.kv_cache_dtype,
            ),
            scheduler=self._scheduler(max_model_len, platform.overlap, platform.step_tokens),
            device=platform.device,
            attention_backend=_OUR_ATTENTION.get(self.attention_backend or "", self.attention_backend),
            seed=self.seed or 0,
            enforce_eager=self.enforce_eager,
            tensor_parallel_size=self.tensor_parallel_size,
            structured_outputs=self._structured_outputs(),
            pooling=override_pooling(
                read_pooling(path, hf_config, architecture), self.runner, self.convert, self.pooler_config
            ),
            log_stats=not self.disable_log_stats,
        )

    def _check(self) -> None:
        self._check_types()
        _one_of("tokenizer_mode", self.tokenizer_mode, ("auto", "hf", "slow"))
        _one_of("load_format", self.load_format, ("auto", "safetensors", "dummy"))
        _one_of("scheduling_policy", self.scheduling_policy, ("fcfs", "priority"))
        _one_of("prefix_caching_hash_algo", self.prefix_caching_hash_algo, ("sha256",))
        _one_of("kv_cache_dtype", self.kv_cache_dtype, ("auto", "fp8", "fp8_e4m3"))
        if self.kv_cache_dtype != "auto" and self.attention_backend in ("torch_native", "reference"):
            raise ParameterError(
                f"attention_backend={self.attention_backend!r} reads keys and values in the model's dtype only",
                "kv_cache_dtype",
                self.kv_cache_dtype,
            )
        _one_of("quantization", self.quantization, (None, "int8", "int4", "w8a8", "fp8"))
        _one_of("distributed_executor_backend", self.distributed_executor_backend, (None, "uni"))
        modes = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")
        _one_of("logprobs_mode", self.logprobs_mode, modes)
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if getattr(self, name) != 1:
                raise ParameterError("this version runs on one device; use 1", name, getattr(self, name))
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ParameterError(f"{name} must be a positive integer", name, value)
        if self.num_gpu_blocks_override is not None and self.num_gpu_blocks_override < 2:
            raise ParameterError("at least 2 blocks are needed: one is reserved for padding", "num_gpu_blocks_override",
                                 self.num_gpu_blocks_override)  # fmt: skip
        if self.gpu_memory_utilization is not None and not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ParameterError("gpu_memory_utilization must be in (0, 1]", "gpu_memory_utilization",
                                 self.gpu_memory_utilization)  # fmt: skip
        if self.max_logprobs < -1:
            raise ParameterError(
                "max_logprobs must be >= 0, or -1 for the vocabulary", "max_logprobs", self.max_logprobs
            )
        if self.long_prefill_token_threshold < 0:
            raise ParameterError("must be >= 0", "long_prefill_token_threshold", self.long_prefill_token_threshold)

    def _check_types(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            kinds = [get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,))]
            if isinstance(value, bool) and bool not in kinds:  # a bool is an int to Python, not to us
                fits = False
            else:
                fits = isinstance(value, tuple(kinds)) or (float in kinds and isinstance(value, int))
            if not fits:
                wanted = " or ".join(kind.__name__.replace("NoneType", "None") for kind in kinds)
                raise ParameterError(f"{name} must be {wanted}", name, value)

    def _structured_outputs(self) -> StructuredOutputsConfig:
        """`reasoning_parser` and `structured_outputs_config`, which may hold vLLM's names of backends."""
        from nanovllm.parsers import REASONING_PARSERS

        given = dict(self.structured_outputs_config)
        backends = ("auto", "guidance", "llguidance", "xgrammar", "outlines", "lm-format-enforcer")
        _one_of("structured_outputs_config.backend", given.pop("backend", "auto"), backends)  # all mean llguidance
        given.pop("disable_fallback", None)  # there is nothing to fall back to
        parser = given.pop("reasoning_parser", None)
        parser = self.reasoning_parser or parser or None
        known = {f.name for f in dataclasses.fields(StructuredOutputsConfig)}
        for name, value in given.items():
            if name not in known or not isinstance(value, bool):
                raise ParameterError("not an option, or not true or false", f"structured_outputs_config.{name}", value)
        _one_of("reasoning_parser", parser, (None, *REASONING_PARSERS))
        return StructuredOutputsConfig(reasoning_parser=parser, **given)

    def _tokenizer_path(self, model_path: Path) -> Path | None:
        if self.skip_tokenizer_init:
            return None
        if self.tokenizer is None:
            return model_path
        return resolve_model_path(
            self.tokenizer,
            revision=self.tokenizer_revision,
            download_dir=self.download_dir,
            hf_token=self.hf_token,
            use_modelscope=self.use_modelscope,
            weights=False,
        )

    def _max_model_len(self, hf_config: dict[str, Any]) -> int:
        """The context in tokens."""
        derived = derived_context(hf_config)
        asked = self.max_model_len
        if asked in (None, "auto", -1):
            return default_context(hf_config)
        if not isinstance(asked, int) or asked < 1:
            raise ParameterError("max_model_len must be a positive integer, 'auto' or -1", "max_model_len", asked)
        if asked > derived and os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") != "1":
            raise ParameterError(
                f"the model's context is {derived} tokens (config.json); longer ones give nonsense unless its RoPE is "
                "scaled by hf_overrides. VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 overrides this check",
                "max_model_len",
                asked,
            )
        return asked

    def _generation(self, path: Path, hf_config: dict[str, Any]) -> dict[str, Any]:
        """EOS ids, and the sampling defaults a checkpoint brings along (generation_config.json)."""
        folder = path if self.generation_config in ("auto", "vllm") else Path(self.generation_config)
        file = folder / "generation_config.json"
        if self.generation_config not in ("auto", "vllm") and not file.is_file():
            raise ParameterError(
                "no generation_config.json in that folder", "generation_config", self.generation_config
            )
        values: dict[str, Any] = read_json(file) if file.is_file() else {}
        eos: list[int] = []
        for source in (values, hf_config):
            ids = source.get("eos_token_id")
            for token in ids if isinstance(ids, list) else [ids]:
                if token is not None and token not in eos:
                    eos.append(token)
        if self.generation_config == "vllm":
            values = {}
        values = {**values, **self.override_generation_config}
        if "max_new_tokens" in values:
            values["max_tokens"] = values.pop("max_new_tokens")
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                 "frequency_penalty", "max_tokens")  # fmt: skip
        defaults = {n: values[n] for n in names if values.get(n) is not None}
        return {"eos_token_ids": tuple(eos), "generation_defaults": defaults}

    def _cache_bytes(self) -> int | None:
        if self.kv_cache_memory_bytes is not None:
            return self.kv_cache_memory_bytes
        legacy = os.environ.get("VLLM_CPU_KVCACHE_SPACE")  # GiB
        if not legacy:
            return None
        try:
            return int(float(legacy) * 2**30)
        except ValueError:
            raise ParameterError("must be a number of GiB", "VLLM_CPU_KVCACHE_SPACE", legacy) from None

    def _scheduler(self, max_model_len: int, overlap: bool, step_tokens: int) -> SchedulerConfig:
        chunked = self.enable_chunked_prefill is not False
        seqs = self.max_num_seqs or min(256, self.max_num_batched_tokens or 256)
        tokens = self.max_num_batched_tokens or max(step_tokens if chunked else max_model_len, seqs)
        if tokens < seqs:
            raise ParameterError(
                f"must be at least max_num_seqs={seqs}: every running request decodes one token per step",
                "max_num_batched_tokens",
                tokens,
            )
        if not chunked and tokens < max_model_len:
            raise ParameterError(
                f"without chunked prefill a prompt of max_model_len={max_model_len} tokens must fit into one step; "
                "raise it, lower max_model_len, or leave enable_chunked_prefill on",
                "max_num_batched_tokens",
                tokens,
            )
        return SchedulerConfig(
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            enable_chunked_prefill=chunked,
            policy=self.scheduling_policy,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            max_steps_in_flight=2 if (overlap if self.async_scheduling is None else self.async_scheduling) else 1,
        )


AsyncEngineArgs = EngineArgs


def _dtype_name(dtype: Any) -> str:
    """vLLM's dtype spellings, and torch dtypes, as one name.

    Raises:
        ParameterError: an unknown dtype.
    """
    name = str(dtype).removeprefix("torch.")
    name = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}.get(
        name, name
    )
    _one_of("dtype", name, ("auto", "bfloat16", "float16", "float32"))
    return name


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(repr(a) for a in allowed)
        raise ParameterError(f"{name} must be one of {choices} in this version", name, value)
