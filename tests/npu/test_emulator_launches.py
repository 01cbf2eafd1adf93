"""Launches and waits of the engine's decode steps, counted where torch-npu hands them to the device."""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tiny_models import make_checkpoint

import nanovllm
from nanovllm import LLM, SamplingParams
from tests.npu.emulator.trace import traced

pytestmark = pytest.mark.emulated
OURS = str(Path(nanovllm.__file__).parent)
WAITS = {"wait for stream", "wait for event", "wait for device"}


@contextlib.contextmanager
def calls_of_ours() -> Iterator[list[str]]:
    """The Python functions of the engine that are called in the block, and those of torch_npu it calls."""
    seen: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        name = f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            seen.append(name)
        elif event == "call" and frame.f_back is not None and frame.f_back.f_code.co_filename.startswith(OURS):
            seen.append(f"-> {name}")

    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def _decode_steps(path: Path, steps: int, eager: bool, watch: Callable[[], Any] = traced) -> collections.Counter[str]:
    """What ``steps`` more steps of a batch of three submit and wait for, or what else ``watch`` lists."""
    prompts = [{"prompt_token_ids": prompt} for prompt in ([5, 9, 17], [77, 3, 8], [99, 1, 4])]
    settings = {"max_model_len": 128, "num_gpu_blocks_override": 20, "max_num_seqs": 4, "enforce_eager": eager}
    counts = []
    with LLM(str(path), device="npu", skip_tokenizer_init=True, enable_prefix_caching=False, **settings) as llm:
        for tokens in (4, 4, 4 + steps):  # the first warms up
            params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            with watch() as names:
                llm.generate(prompts, params, use_tqdm=False)
            counts.append(collections.Counter(names))
    counts[2].subtract(counts[1])
    return counts[2]


def _checkpoint(path: Path, family: str, layers: int) -> Path:
    sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=128, num_hidden_layers=layers)
    make_checkpoint(path, family, **sizes)
    return path


@pytest.mark.parametrize("family, most", [("llama", 10), ("qwen3", 12)])  # qwen3 has norms of queries and keys
def test_launches_of_a_layer_stay_within_the_budget(family: str, most: int, tmp_path: Path) -> None:
    steps, two, four = 8, _checkpoint(tmp_path / "two", family, 2), _checkpoint(tmp_path / "four", family, 4)
    fewer, more = _decode_steps(two, steps, eager=True), _decode_steps(four, steps, eager=True)
    layer = {name: (more[name] - fewer[name]) / 2 / steps for name in more if more[name] != fewer[name]}
    assert sum(layer.values()) == most, layer
    waits = sum(more[name] for name in WAITS)
    assert waits <= steps, more


def test_a_recorded_step_is_one_launch_and_the_updates_of_its_layers(tmp_path: Path) -> None:
    steps, path = 8, _checkpoint(tmp_path, "qwen3", 2)
    counts = _decode_steps(path, steps, eager=False)
    assert counts["graph launch"] == steps
    assert counts["aclnnFusedInferAttentionScoreV3"] == 2 * steps, "a task update each"
    assert counts["aclnnMatmul"] + counts["aclnnMm"] <= steps, "what is recorded is not submitted again"


def test_a_replay_is_the_same_work_for_us_however_many_layers_there_are(tmp_path: Path) -> None:
    """One call of torch_npu brings the lengths of a step to all layers; what it does inside is one update a layer."""
    steps, counts = 6, {}
    for layers in (2, 4):
        path = _checkpoint(tmp_path / str(layers), "qwen3", layers)
        counts[layers] = +_decode_steps(path, steps, eager=False, watch=calls_of_ours)
    assert counts[2]["-> graphs.py:replay"] == counts[2]["-> graphs.py:update"] == steps
    assert counts[2] == counts[4]
