"""Options of ``vllm serve`` that have no meaning here, so that its command lines and files can be used as they are.

Those that may be left out without harm are taken with a warning that says what there is instead. Those a server would
be wrong without are refused, unless their value asks for nothing.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from typing import Any

from nanovllm.entrypoints.cli.parser import CommandParser, MergeJson
from nanovllm.errors import ParameterError

logger = logging.getLogger(__name__)

TAKEN_SWITCHES = {
    "disable_frontend_multiprocessing": "the engine always runs in a process of its own",
    "enable_reasoning": "--reasoning-parser turns it on",
    "exclude_tools_when_tool_choice_none": "the model is never told of tools it may not call",
    "disable_cascade_attn": "there is no cascade attention",
    "disable_chunked_mm_input": "the model reads text only",
    "disable_hybrid_kv_cache_manager": "there is one kind of cache",
    "language_model_only": "the model reads text only",
    "scheduler_reserve_full_isl": "a request is admitted when its prompt fits",
    "calculate_kv_scales": "the cache is not quantised",
    "show_hidden_metrics_for_version": "no metrics are hidden",
    "use_tqdm_on_load": "loading takes a second",
    "enable_log_outputs": "answers are not logged",
    "enable_log_deltas": "answers are not logged",
    "log_error_stack": "faults are always logged with their stack",
}
TAKEN_VALUES = {
    "chat_template_content_format": "what a template takes is found out",
    "tool_strict_level": "schemas are always enforced for required and named tools, and for strict ones",
    "h11_max_header_count": "heads are limited by --h11-max-incomplete-event-size",
    "config_format": "checkpoints are in the Hugging Face format",
    "tokenizer_pool_size": "prompts are tokenised on threads",
    "max_parallel_loading_workers": "weights are read on as many threads as compute",
    "safetensors_load_strategy": "weights are read on as many threads as compute",
    "max_num_partial_prefills": "prompts share a step's tokens as they fit",
    "max_long_partial_prefills": "prompts share a step's tokens as they fit",
    "cudagraph_capture_sizes": "graphs are chosen by batch size",
    "cuda_graph_sizes": "graphs are chosen by batch size",
    "max_cudagraph_capture_size": "graphs are chosen by batch size",
    "mm_processor_cache_gb": "the model reads text only",
    "allowed_local_media_path": "no files are read for requests",
    "allowed_media_domains": "nothing is fetched for requests",
    "max_loras": "there are no adapters",
    "max_lora_rank": "there are no adapters",
    "max_cpu_loras": "there are no adapters",
    "lora_dtype": "there are no adapters",
}
TAKEN_JSON = {
    "compilation_config": "nothing is compiled; --enforce-eager switches graphs off",
    "speculative_config": "tokens are generated one by one; the text is the same",
    "additional_config": "it is for vLLM's plug-ins",
    "limit_mm_per_prompt": "the model reads text only",
    "mm_processor_kwargs": "the model reads text only",
    "profiler_config": "there is no profiler; --enable-log-requests and /metrics tell of requests",
    "kv_events_config": "the cache sends no events",
}
# name -> (what to do instead, values that ask for nothing)
REFUSED_SWITCHES = {
    "enable_lora": "adapters are not supported: serve a merged model",
    "enable_sleep_mode": "the engine does not sleep: stop the server",
    "enable_expert_parallel": "this version runs on one device",
    "enable_eplb": "this version runs on one device",
    "enable_dbo": "this version runs on one device",
    "enable_prompt_embeds": "prompts are text or token ids",
    "enable_mm_embeds": "the model reads text only",
    "headless": "this version runs on one host",
    "data_parallel_hybrid_lb": "start one server per copy and put a balancer before them",
    "data_parallel_external_lb": "start one server per copy and put a balancer before them",
    "disable_sliding_window": "shorten the context: --max-model-len",
    "enable_ssl_refresh": "restart the server after a certificate has changed",
}
REFUSED_VALUES: dict[str, tuple[str, tuple[str, ...]]] = {
    "lora_modules": ("adapters are not supported: serve a merged model", ()),
    "tool_parser_plugin": ("use one of the parsers --tool-call-parser names", ("",)),
    "reasoning_parser_plugin": ("use one of the parsers --reasoning-parser names", ("",)),
    "api_server_count": ("there is one front process; start more servers and balance between them", ("1",)),
    "logits_processors": ("use logit_bias, bad_words, allowed_token_ids or structured outputs", ()),
    "model_impl": ("models run on their own implementation", ("auto", "vllm")),
    "rope_scaling": ("use --hf-overrides.rope_scaling", ()),
    "rope_theta": ("use --hf-overrides.rope_theta", ()),
    "code_revision": ("code from the hub is not pinned; review it and use a folder", ()),
    "model_loader_extra_config": ("weights are read from safetensors files", ("{}",)),
    "cpu_offload_gb": ("weights stay where the model runs: quantise it (-q int8) or use a smaller one", ("0", "0.0")),
    "kv_offloading_size": ("the cache stays where the model runs: --kv-cache-memory-bytes sizes it", ("0", "0.0")),
    "kv_offloading_backend": ("the cache stays where the model runs", ()),
    "kv_transfer_config": ("the cache of a request stays in this server", ()),
    "max_num_active_seqs": ("use --max-num-seqs", ()),
    "watermark": ("blocks are handed out to the last", ("0", "0.0")),
    "scheduler_cls": ("use --scheduling-policy", ()),
    "decode_context_parallel_size": ("this version runs on one device", ("1",)),
    "prefill_context_parallel_size": ("this version runs on one device", ("1",)),
    "data_parallel_size_local": ("this version runs on one device", ("1",)),
    "data_parallel_address": ("this version runs on one host", ()),
    "data_parallel_rpc_port": ("this version runs on one host", ()),
    "data_parallel_rank": ("this version runs on one host", ("0",)),
    "data_parallel_backend": ("this version runs on one host", ()),
    "nnodes": ("this version runs on one host", ("1",)),
    "node_rank": ("this version runs on one host", ("0",)),
    "master_addr": ("this version runs on one host", ()),
    "master_port": ("this version runs on one host", ()),
    "all2all_backend": ("this version runs on one device", ()),
    "collect_detailed_traces": ("spans have the times in queue, prefill and decode: --otlp-traces-endpoint", ()),
    "device_ids": ("choose devices by the environment (CUDA_VISIBLE_DEVICES, ASCEND_RT_VISIBLE_DEVICES)", ()),
}
_SHORT = {"compilation_config": "-cc", "speculative_config": "-sc", "enable_expert_parallel": "-ep",
          "decode_context_parallel_size": "-dcp", "prefill_context_parallel_size": "-pcp"}  # fmt: skip


def add_vllm_flags(parser: CommandParser) -> None:
    """Take the options above, and second names of ours, without a line in the help."""
    second: dict[str, Any] = {"dest": "gpu_memory_utilization", "type": float, "default": argparse.SUPPRESS}
    parser.add_argument("--device-memory-utilization", help=argparse.SUPPRESS, **second)
    known = parser._option_string_actions
    for name, settings in _settings():
        flags = [*([_SHORT[name]] if name in _SHORT else []), "--" + name.replace("_", "-")]
        flags = [flag for flag in flags if flag not in known]
        if flags:
            parser.add_argument(*flags, dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **settings)


def judge_vllm_flags(arguments: argparse.Namespace) -> None:
    """Warn of what was taken.

    Raises:
        ParameterError: an option that cannot be left out.
    """
    given = vars(arguments)
    for name, remedy in REFUSED_SWITCHES.items():
        if given.get(name):
            raise ParameterError(f"not supported by this version: {remedy}", name, given[name])
    for name, (remedy, harmless) in REFUSED_VALUES.items():
        if name in given and " ".join(given[name]) not in harmless:
            raise ParameterError(f"not supported by this version: {remedy}", name, " ".join(given[name]))
    for name, instead in {**TAKEN_SWITCHES, **TAKEN_VALUES, **TAKEN_JSON}.items():
        if name in given:
            logger.warning("--%s has no effect: %s.", name.replace("_", "-"), instead)


def _settings() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in (*TAKEN_SWITCHES, *REFUSED_SWITCHES):
        yield name, {"action": argparse.BooleanOptionalAction}
    for name in (*TAKEN_VALUES, *REFUSED_VALUES):
        yield name, {"nargs": "+"}
    for name in TAKEN_JSON:
        yield name, {"action": MergeJson}
