"""Configuration: what is resolved from a checkpoint and from the environment, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanovllm.config import EngineArgs
from nanovllm.errors import ModelError, ParameterError
from nanovllm.hub import resolve_model_path
from nanovllm.model_files import default_context, derived_context, read_hf_config

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 100,
    "max_position_embeddings": 4096,
    "eos_token_id": 3,
    "dtype": "float32",
}


def folder(path: Path, generation: dict[str, Any] | None = None, **config: Any) -> Path:
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def build(path: Path, **options: Any) -> Any:
    return EngineArgs.from_kwargs(model=str(path), skip_tokenizer_init=True, **options).build()


@pytest.mark.parametrize(
    ("config", "longest", "default"),
    [
        ({"max_position_embeddings": 4096}, 4096, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2}}, 8192, 8192),
        ({"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "dynamic", "factor": 2}}, 8192, 4096),
        (
            {
                "max_position_embeddings": 32768,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e6,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
            131072,
        ),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8}}, 131072, 131072),
        ({}, 2048, 2048),
    ],
    ids=str,
)
def test_the_context_follows_from_the_checkpoint_and_its_rope(config: dict[str, Any], longest: int, default: int):
    assert derived_context(config) == longest
    assert default_context(config) == default


def test_a_longer_context_than_the_models_is_refused_unless_insisted_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ParameterError, match="4096 tokens"):
        build(folder(tmp_path), max_model_len=5000)
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    assert build(tmp_path, max_model_len=5000).model.max_model_len == 5000
    assert build(tmp_path, max_model_len="auto").model.max_model_len == 4096
    assert build(tmp_path, max_model_len=-1).model.max_model_len == 4096


def test_eos_is_the_union_of_both_files(tmp_path: Path):
    # field_lessons 5.17: Llama 3.2 ends with any of three.
    path = folder(tmp_path, {"eos_token_id": [5, 6]}, eos_token_id=[6, 7])
    assert build(path).model.eos_token_ids == (5, 6, 7)


@pytest.mark.parametrize(
    ("file", "options", "expected"),
    [
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 64}, {},
         {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_tokens": 64}),
        ({"temperature": 0.6}, {"generation_config": "vllm"}, {}),
        ({"temperature": 0.6}, {"override_generation_config": {"temperature": 0.1}}, {"temperature": 0.1}),
        ({"temperature": 0.6, "do_sample": False}, {}, {"temperature": 0.6}),  # as vLLM: do_sample is not looked at
        ({"transformers_version": "5.0"}, {}, {}),
    ],
)  # fmt: skip
def test_sampling_defaults_come_from_the_checkpoint(tmp_path: Path, file: Any, options: Any, expected: Any):
    assert build(folder(tmp_path, file), **options).model.generation_defaults == expected


def test_nested_text_configs_and_overrides_are_read(tmp_path: Path):
    folder(tmp_path, text_config={"vocab_size": 7})
    assert read_hf_config(tmp_path)[0]["vocab_size"] == 7
    config, architecture = read_hf_config(tmp_path, {"architectures": ["Other"], "text_config": None})
    assert architecture == "Other" and config["vocab_size"] == 100


def test_quantised_checkpoints_are_refused_by_method(tmp_path: Path):
    with pytest.raises(ModelError, match="awq"):
        build(folder(tmp_path, quantization_config={"quant_method": "awq"}))


@pytest.mark.parametrize(
    ("given", "expected"),
    [("half", "float16"), ("float", "float32"), ("bfloat16", "bfloat16"), ("auto", "float32"), ("fp32", "float32")],
)
def test_dtypes_go_by_vllms_names(tmp_path: Path, given: str, expected: str):
    assert build(folder(tmp_path), dtype=given).model.dtype == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, None), ("FLASH_ATTN", "flash_attn"), ("FLASHINFER", "flashinfer"), ("TRITON_ATTN", "triton"),
     ("torch_native", "torch_native")],
)  # fmt: skip
def test_attention_backends_go_by_vllms_names_too(tmp_path: Path, given: str | None, expected: str | None):
    assert build(folder(tmp_path), attention_backend=given).attention_backend == expected


def test_torch_dtype_of_older_configs_is_read(tmp_path: Path):
    path = folder(tmp_path, dtype=None, torch_dtype="float32")
    assert build(path).model.dtype == "float32"


def test_the_legacy_variable_sizes_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1.5")
    assert build(folder(tmp_path)).cache.memory_bytes == int(1.5 * 2**30)
    assert build(tmp_path, kv_cache_memory_bytes=1000).cache.memory_bytes == 1000
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "lots")
    with pytest.raises(ParameterError, match="VLLM_CPU_KVCACHE_SPACE"):
        build(tmp_path)


def test_limits_of_a_step_fit_together(tmp_path: Path):
    path = folder(tmp_path)
    assert build(path).scheduler.max_num_batched_tokens >= build(path).scheduler.max_num_seqs
    assert build(path, device="cpu").scheduler.max_num_batched_tokens == 1024
    small = build(path, max_num_batched_tokens=16).scheduler
    assert (small.max_num_seqs, small.max_num_batched_tokens) == (16, 16)
    assert build(path, enable_chunked_prefill=False).scheduler.max_num_batched_tokens >= 4096
    with pytest.raises(ParameterError, match="chunked prefill"):
        build(path, enable_chunked_prefill=False, max_num_batched_tokens=512)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpu_memory_utilization", "0.5"),
        ("seed", "x"),
        ("max_model_len", True),
        ("block_size", True),
        ("enable_prefix_caching", "yes"),
        ("hf_overrides", []),
        ("disable_log_stats", "no"),
        ("max_num_seqs", 2.5),
    ],
)
def test_values_of_the_wrong_type_are_refused_by_name(tmp_path: Path, name: str, value: Any):
    with pytest.raises(ParameterError, match=name):
        build(folder(tmp_path), **{name: value})


def test_paths_and_torch_dtypes_are_taken(tmp_path: Path):
    import torch

    config = EngineArgs(model=folder(tmp_path), skip_tokenizer_init=True, dtype=torch.float16).build()  # type: ignore[arg-type]
    assert (config.model.path, config.model.dtype) == (tmp_path, "float16")


def test_a_vocabulary_is_needed(tmp_path: Path):
    with pytest.raises(ModelError, match="vocab_size"):
        build(folder(tmp_path, vocab_size=0))


def test_model_names_that_lead_nowhere_say_what_was_tried(tmp_path: Path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="is a file"):
        resolve_model_path(file)
    with pytest.raises(ModelError, match="not a hub id"):
        resolve_model_path("a/b/c")
    with pytest.raises(ModelError, match=r"Hugging Face hub failed.*HF_ENDPOINT"):
        resolve_model_path("nobody/nothing-at-all", download_dir=str(tmp_path))
    with pytest.raises(ModelError, match="pip install modelscope"):
        resolve_model_path("nobody/nothing-at-all", use_modelscope=True)


def test_the_models_in_the_box_are_local_folders_with_one_tokenizer():
    large, small = (resolve_model_path(name) for name in ("demo", "demo-small"))
    assert (large / "config.json").is_file() and (small / "config.json").is_file()
    assert (large / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()
