"""The fused operator for Ascend against the reference, under Triton's interpreter; and lowered by triton-ascend."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ascend_lower
import pytest
import torch
from cuda_device import DEVICE, ON_GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from tiny_models import make_checkpoint

from nanovllm import LLM, SamplingParams
from nanovllm.ops import Operators, npu, reference, torch_operators
from nanovllm.ops.npu import fused

DTYPES = [torch.float32, torch.float16]  # the interpreter does not round to bfloat16 as hardware does
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3}
pytestmark = pytest.mark.skipif(ON_GPU, reason="a kernel for Ascend")


def refuse(*arguments: object) -> Tensor:
    raise AssertionError("this should not have been asked")


FORBIDDEN = dataclasses.replace(torch_operators(), norm_rotate_write=refuse)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def inputs(
    slots: list[int], heads: int, kv_heads: int, size: int, norm: bool, dtype: torch.dtype, seed: int = 0
) -> list[object]:
    """Arguments of ``norm_rotate_write`` for a cache of 5 blocks of 4 slots."""
    qkv = draw(len(slots), heads + 2 * kv_heads, size, seed=seed, dtype=dtype)
    weights = [draw(size, seed=seed + i, dtype=dtype) if norm else None for i in (1, 2)]
    turn = [draw(len(slots), 1, size, seed=seed + i, dtype=dtype) for i in (3, 4)]
    caches = [draw(5, 4, kv_heads, size, seed=seed + i, dtype=dtype) for i in (5, 6)]
    return [qkv, *weights, 1e-5, *turn, *caches, torch.tensor(slots, dtype=torch.int64)]


def agree(arguments: list[object], base: Operators = FORBIDDEN, programs: int = 3) -> None:
    """The operator gives q and caches as the reference does, slots nobody writes included."""
    expected = [each.clone() if isinstance(each, Tensor) else each for each in arguments]
    q = fused.FusedNormRotateWrite(base, programs).norm_rotate_write(*arguments)  # type: ignore[arg-type]
    right = reference.norm_rotate_write(*expected)  # type: ignore[arg-type]
    for ours, theirs in zip((q, *arguments[6:8]), (right, *expected[6:8]), strict=True):
        assert isinstance(ours, Tensor) and isinstance(theirs, Tensor) and ours.dtype == theirs.dtype
        tolerance = TOLERANCE[ours.dtype]
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@settings(max_examples=12, deadline=None)
@given(
    slots=st.lists(st.integers(0, 19), unique=True, max_size=5),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 7]),
    half=st.sampled_from([1, 3, 8, 64]),
    norm=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    programs=st.sampled_from([1, 2, 40]),
    seed=st.integers(0, 99),
)
def test_it_computes_what_the_reference_computes(
    slots: list[int], kv_heads: int, group: int, half: int, norm: bool, dtype: torch.dtype, programs: int, seed: int
) -> None:
    agree(inputs(slots, kv_heads * group, kv_heads, 2 * half, norm, dtype, seed), programs=programs)


def test_halves_are_not_mixed_up() -> None:
    """Rotation by a right angle: out is (-second, first), exactly."""
    arguments = inputs([3], 1, 1, 8, False, torch.float32)
    arguments[4], arguments[5] = torch.zeros(1, 1, 8), torch.ones(1, 1, 8)
    arguments[5][..., :4] = -1  # type: ignore[index]
    qkv = arguments[0]
    assert isinstance(qkv, Tensor)
    q = fused.FusedNormRotateWrite(FORBIDDEN).norm_rotate_write(*arguments)  # type: ignore[arg-type]
    assert torch.equal(q[0, 0], torch.cat([-qkv[0, 0, 4:], qkv[0, 0, :4]]))


def test_slots_of_32_bits() -> None:
    arguments = inputs([7, 2], 2, 1, 16, True, torch.float16)
    expected = [each.clone() if isinstance(each, Tensor) else each for each in arguments]
    arguments[8] = torch.tensor([7, 2], dtype=torch.int32)
    q = fused.FusedNormRotateWrite(FORBIDDEN).norm_rotate_write(*arguments)  # type: ignore[arg-type]
    torch.testing.assert_close(q, reference.norm_rotate_write(*expected), atol=2e-3, rtol=2e-3)  # type: ignore[arg-type]
    assert torch.equal(arguments[7], expected[7])  # type: ignore[arg-type]


@pytest.mark.parametrize("case", ["strided qkv", "strided cache", "one weight", "another dtype", "too large"])
def test_what_the_kernel_does_not_know_goes_to_torch(case: str) -> None:
    """The kernel must not be launched: its result would be wrong, or not fit a vector core."""
    heads = 256 if case == "too large" else 2
    arguments = inputs([1, 9], heads, 1, 64, True, torch.float32)
    if case == "strided qkv":
        arguments[0] = draw(2, 4, 128)[..., ::2]
    elif case == "strided cache":
        arguments[6] = draw(5, 4, 2, 64)[:, :, :1]
    elif case == "one weight":
        arguments[1] = None
    elif case == "another dtype":
        arguments[4], arguments[5] = (each.double() for each in arguments[4:6])  # type: ignore[attr-defined]
    done_by_torch = torch.zeros(1)
    operator = fused.FusedNormRotateWrite(
        dataclasses.replace(torch_operators(), norm_rotate_write=lambda *arguments: done_by_torch)
    )
    operator._launch = refuse  # type: ignore[method-assign]
    assert operator.norm_rotate_write(*arguments) is done_by_torch  # type: ignore[arg-type]


def test_a_launch_that_fails_is_the_last(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs([1, 9], 2, 1, 16, True, torch.float32)
    operator = fused.FusedNormRotateWrite(torch_operators())
    launches = []

    def fail(*arguments: object) -> Tensor:
        launches.append(1)
        raise RuntimeError("bishengir-compile: not found")

    monkeypatch.setattr(operator, "_launch", fail)
    monkeypatch.setattr(logging.getLogger("nanovllm"), "propagate", True)
    expected = reference.norm_rotate_write(*(e.clone() if isinstance(e, Tensor) else e for e in arguments))  # type: ignore[arg-type]
    with caplog.at_level("WARNING"):
        for _ in range(3):
            q = operator.norm_rotate_write(*arguments)  # type: ignore[arg-type]
    assert torch.equal(q, expected) and len(launches) == 1
    assert caplog.text.count("bishengir-compile: not found") == 1


def test_it_is_off_unless_asked_for_and_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = torch_operators()
    monkeypatch.delenv(fused.VARIABLE, raising=False)
    assert fused.with_fused(base) is base
    monkeypatch.setenv(fused.VARIABLE, "1")
    monkeypatch.setattr(logging.getLogger("nanovllm"), "propagate", True)
    with caplog.at_level("WARNING"):
        assert fused.with_fused(base) is base
    assert "needs triton-ascend" in caplog.text
    info = tmp_path / "triton_ascend-3.2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: triton-ascend\nVersion: 3.2.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert fused.with_fused(base).norm_rotate_write is not base.norm_rotate_write


def test_the_table_of_an_npu_has_it_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an Atlas A2, and not on a 310P, whose cache it does not know."""
    (tmp_path / "triton_ascend-3.2.0.dist-info").mkdir()
    (tmp_path / "triton_ascend-3.2.0.dist-info/METADATA").write_text("Name: triton-ascend\nVersion: 3.2.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def fused_in(is_310p: bool) -> bool:
        table = npu.operators(torch_operators(), SimpleNamespace(rms_norm=None, add_rms_norm=None), is_310p)
        return isinstance(getattr(table.norm_rotate_write, "__self__", None), fused.FusedNormRotateWrite)

    monkeypatch.delenv(fused.VARIABLE, raising=False)
    assert not fused_in(False)
    monkeypatch.setenv(fused.VARIABLE, "1")
    assert fused_in(False) and not fused_in(True)


def test_an_engine_gives_the_tokens_it_gives_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, chunks and decodes, through the kernel."""
    make_checkpoint(tmp_path, "qwen3", max_position_embeddings=64)
    operator = fused.FusedNormRotateWrite(FORBIDDEN, programs=3)
    tables = [torch_operators(), dataclasses.replace(torch_operators(), norm_rotate_write=operator.norm_rotate_write)]
    settings = {"dtype": "float32", "skip_tokenizer_init": True, "num_gpu_blocks_override": 40, "device": "cpu"}
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, detokenize=False)
    tokens = []
    for table in tables:
        monkeypatch.setattr("nanovllm.runner.model_runner.operator_table", lambda *arguments, table=table: table)
        with LLM(str(tmp_path), max_num_batched_tokens=8, max_num_seqs=4, **settings) as llm:
            outputs = llm.generate(
                [{"prompt_token_ids": [5 + i] * (3 * i + 1)} for i in range(4)], params, use_tqdm=False
            )
        tokens.append([output.outputs[0].token_ids for output in outputs])
    assert tokens[0] == tokens[1]


def test_triton_ascend_lowers_it() -> None:
    """Down to linalg, for the vector cores alone; CANN's own compiler would go on from there."""
    if reason := ascend_lower.install():
        pytest.skip(reason)
    command = [sys.executable, ascend_lower.__file__, str(ascend_lower.SITE)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lowered = json.loads(done.stdout)
    assert len(lowered) == 2 * len(ascend_lower.SHAPES)
    for kernel in lowered:
        assert kernel["mix_mode"] == "aiv" and kernel["gathers"] == 0 and kernel["tile_bytes"] <= 192 * 1024
