"""Dataclass fields as command line options: `EngineArgs` for every command that runs an engine, `SamplingParams` for
those that sample.

A field's name, type and default stay where they are declared; here it gets its help text. An option that is not given
leaves no attribute, so that a default is written once.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
from collections.abc import Callable, Container, Mapping
from typing import Any, Union, get_args, get_origin

from nanovllm.config import RETIRED, EngineArgs
from nanovllm.entrypoints.cli.parser import CommandParser, MergeJson, add_config_flag, human_int

ENGINE_HELP: dict[str, dict[str, str]] = {
    "model": {
        "model": "a folder, a hub id such as Qwen/Qwen3-0.6B, or 'demo', the model in the box",
        "dtype": "auto is the checkpoint's, where the device is fast at it",
        "device": "auto takes the best there is: a GPU, an Ascend NPU, the CPU",
        "max_model_len": "context in tokens, or auto: the model's, shortened to what the KV cache holds",
        "revision": "branch, tag or commit on the hub",
        "hf_token": "token for the hub; without a value the one the hub's own login saved",
        "hf_overrides": "JSON object laid over the model's config.json",
        "download_dir": "where downloads are kept",
        "use_modelscope": "look hub ids up on ModelScope instead of Hugging Face",
        "load_format": "dummy makes random weights",
        "trust_remote_code": "let transformers run code that comes with the checkpoint",
        "quantization": "int8, int4, w8a8 or (on a GPU) fp8: quantise the weights as they are loaded",
        "generation_config": "auto (the model's sampling defaults), vllm (none), or a folder with that file",
        "override_generation_config": "JSON object laid over generation_config.json",
        "seed": "of every random draw of requests that bring no seed of their own",
        "max_logprobs": "most log-probabilities a request may ask for; -1: the whole vocabulary",
        "logprobs_mode": "what stands for a log-probability: before or after sampling parameters, normalised or not",
        "enforce_eager": "never capture graphs",
        "attention_backend": "which attention to use; by default the device's own",
        "reasoning_parser": "how the model writes reasoning; constraints begin behind it",
        "runner": "pooling: the model makes vectors and does not generate; auto: as its files say",
        "convert": "embed or none; every model can embed",
        "pooler_config": "JSON object: pooling_type (LAST, MEAN), normalize, dimensions",
        "structured_outputs_config": "JSON object: disable_any_whitespace, disable_additional_properties, ...",
    },
    "tokenizer": {
        "tokenizer": "folder or hub id of the tokenizer, if not the model's",
        "tokenizer_mode": "hf goes through transformers, slow takes its Python implementation",
        "tokenizer_revision": "branch, tag or commit of the tokenizer on the hub",
        "skip_tokenizer_init": "token ids only",
        "chat_template": "file or text of the chat template, instead of the model's",
    },
    "KV cache": {
        "gpu_memory_utilization": "share of the device's memory for the engine; on a CPU, of free memory (half)",
        "kv_cache_memory_bytes": "size of the KV cache, such as 512M; overrides the share",
        "block_size": "tokens in a block",
        "num_gpu_blocks_override": "number of blocks; overrides both",
        "kv_cache_dtype": "auto is the model's; fp8 (e4m3) on GPUs that have it",
        "enable_prefix_caching": "compute a prefix that prompts share only once",
        "prefix_caching_hash_algo": "hash that identifies a block's contents",
    },
    "scheduler": {
        "max_num_seqs": "most requests in a step",
        "max_num_batched_tokens": "most tokens in a step",
        "enable_chunked_prefill": "let a long prompt take several steps",
        "long_prefill_token_threshold": "most prompt tokens of one request in a step; 0: no limit",
        "scheduling_policy": "fcfs: first come, first served",
        "async_scheduling": "plan the next step while one runs",
        "disable_log_stats": "do not log throughput, queue and cache usage every ten seconds",
    },
    "parallel": {
        "tensor_parallel_size": "devices that share every layer",
        "pipeline_parallel_size": "groups of layers on different devices",
        "data_parallel_size": "copies of the model",
        "distributed_executor_backend": "where ranks live: uni, this process",
    },
}

SAMPLING_HELP: dict[str, str] = {
    "n": "number of outputs per prompt",
    "max_tokens": "most tokens to generate",
    "min_tokens": "generate at least this many",
    "temperature": "0 always takes the likeliest token",
    "top_p": "sample among the likeliest tokens whose probabilities reach this sum",
    "top_k": "sample among this many; 0: all",
    "min_p": "sample among tokens at least this fraction as likely as the likeliest",
    "seed": "makes the output reproducible",
    "stop": "end at this string; may be given several times",
    "stop_token_ids": "end at this token id; may be given several times",
    "ignore_eos": "go on after the end of text",
    "presence_penalty": "makes tokens already in the output less likely",
    "frequency_penalty": "the same, times the number of occurrences",
    "repetition_penalty": "above 1: makes tokens of prompt and output less likely",
    "bad_words": "never generate this string; may be given several times",
    "logprobs": "log-probabilities per token",
    "skip_special_tokens": "leave special tokens out of the text",
}

# What a value looks like in the help, and so what a shell completes it to, where its type does not say.
METAVARS: dict[str, str] = {
    "model": "MODEL",
    "dtype": "{auto,bfloat16,float16,float32}",
    "device": "{auto,cpu,cuda,npu}",
    "download_dir": "FOLDER",
    "load_format": "{auto,safetensors,dummy}",
    "runner": "{auto,generate,pooling}",
    "convert": "{auto,none,embed}",
    "reasoning_parser": "{qwen3,deepseek_r1}",
    "logprobs_mode": "{raw_logprobs,processed_logprobs,raw_logits,processed_logits}",
    "tokenizer_mode": "{auto,hf,slow}",
    "chat_template": "FILE",
    "tenants": "FILE",
    "kv_cache_dtype": "{auto,fp8,fp8_e4m3}",
    "prefix_caching_hash_algo": "{sha256}",
    "scheduling_policy": "{fcfs,priority}",
    "distributed_executor_backend": "{uni}",
}

_SHORT = {"tensor_parallel_size": "-tp", "pipeline_parallel_size": "-pp", "data_parallel_size": "-dp",
          "quantization": "-q"}  # fmt: skip


def add_engine_flags(parser: CommandParser, without: Container[str] = ()) -> None:
    """Options for the fields of `EngineArgs`, in groups, and ``--config`` for all of a command's options.

    Args:
        without: fields, or short forms (``-q``), that are not to be made.
    """
    add_config_flag(parser)
    for title, helps in ENGINE_HELP.items():
        chosen = {name: text for name, text in helps.items() if name not in without}
        add_field_flags(parser.add_argument_group(title), EngineArgs, chosen, without=without)
    parser.add_argument(
        "-O",
        "--optimization-level",
        action=_OptimizationLevel,
        choices=("0", "1", "2", "3"),
        default=argparse.SUPPRESS,
        help="optimisation level: 0 is --enforce-eager, all others are the same",
    )
    for name in RETIRED:  # taken, so that vLLM's scripts run; `EngineArgs.from_kwargs` says what became of them
        if name.startswith(("disable_", "use_", "worker_")):
            parser.add_argument(_flag(name), action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        else:
            parser.add_argument(_flag(name), default=argparse.SUPPRESS, help=argparse.SUPPRESS)


class _OptimizationLevel(argparse.Action):
    """vLLM's levels, of which only the lowest means something else here."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if values == "0":
            namespace.enforce_eager = True


def engine_args(arguments: argparse.Namespace, without: Container[str] = ()) -> dict[str, Any]:
    """What the user gave of the options of `add_engine_flags`, as keyword arguments of `EngineArgs.from_kwargs`."""
    names = [field.name for field in dataclasses.fields(EngineArgs)] + list(RETIRED)
    given = vars(arguments)
    return {name: given[name] for name in names if name in given and name not in without}


def add_field_flags(
    group: Any,
    cls: type,
    helps: Mapping[str, str],
    defaults: Mapping[str, Any] | None = None,
    without: Container[str] = (),
) -> None:
    """An option for each field of the dataclass ``cls`` that ``helps`` names.

    Args:
        group: a parser or argument group.
        defaults: shown in the help instead of the field's own default.
        without: short forms that are not to be made.
    """
    names = vars(sys.modules[cls.__module__])
    own = {field.name: field for field in dataclasses.fields(cls)}
    for name, text in helps.items():
        default = {**{name: own[name].default}, **(defaults or {})}[name]
        if default is not None and default is not dataclasses.MISSING and not isinstance(default, bool):
            text += f" (default: {default})"
        hint = eval(str(own[name].type), names)  # annotations are text there (PEP 563)
        options = [_SHORT[name]] if name in _SHORT and _SHORT[name] not in without else []
        kind = _kind(hint)
        if name in METAVARS:
            kind["metavar"] = METAVARS[name]
        group.add_argument(*options, _flag(name), default=argparse.SUPPRESS, help=text.replace("%", "%%"), **kind)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kind(hint: Any) -> dict[str, Any]:
    """How argparse reads a value of this type."""
    kinds = set(get_args(hint)) - {type(None)} if get_origin(hint) in (Union, types.UnionType) else {hint}
    if kinds == {bool}:
        return {"action": argparse.BooleanOptionalAction}
    if bool in kinds:  # a value, or nothing
        return {"nargs": "?", "const": True, "metavar": "VALUE"}
    lists = [kind for kind in kinds if get_origin(kind) is list]
    if lists:
        return {"action": "append", "type": _reader(set(get_args(lists[0]))), "metavar": "VALUE"}
    if any(get_origin(kind) is dict for kind in kinds):
        return {"action": MergeJson}
    metavar = "N" if kinds <= {int, float} else "VALUE"
    return {"type": _reader(kinds), "metavar": metavar}


def _reader(kinds: set[Any]) -> Callable[[str], Any]:
    if kinds == {int, str}:
        return _int_or_word
    return human_int if kinds == {int} else float if kinds == {float} else str


def _int_or_word(text: str) -> int | str:
    return text if text.isalpha() else human_int(text)
