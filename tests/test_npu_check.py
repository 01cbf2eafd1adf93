"""The command that checks and measures an NPU works; on a CPU it is a rehearsal, and its figures are not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "benchmarks/npu_check.py", "--device", "cpu", "--quick"]


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the checks."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import npu_correctness

    return npu_correctness


def test_the_rehearsal_passes_and_writes_what_a_report_needs(tmp_path: Path) -> None:
    output = tmp_path / "npu.json"
    parts = ["operators", "tokens", "prefix_cache", "chunks", "preemption", "measured_limits", "nano_vllm_bench"]
    command = [*COMMAND, "--output", str(output), "--only", *parts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(output.read_text())
    assert results["quick"] and results["machine"]["versions"]["torch"]
    assert all(results["checks"][name]["passed"] for name in parts[:5])
    assert {"rms_norm", "linear", "paged_attention, heads of 128"} <= set(results["checks"]["operators"])
    assert results["checks"]["prefix_cache"]["cached tokens"] > 0 and results["checks"]["preemption"]["preemptions"] > 0
    assert results["checks"]["tokens"]["equal"] == 10  # in float32 on both sides there is nothing to be unsure of
    assert results["nano_vllm_bench"]["output_tokens_per_s"] > 0


def test_without_an_npu_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/npu_check.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "torch-npu" in done.stderr


def found(*tokens: int, second: int, by: float) -> tuple[list[int], list[Any]]:
    """A run's tokens, each ``by`` more likely than ``second``."""
    logprobs = [{t: SimpleNamespace(logprob=-0.5), second: SimpleNamespace(logprob=-0.5 - by)} for t in tokens]
    return list(tokens), logprobs


def test_tokens_may_differ_only_where_two_are_equally_likely(checks: Any) -> None:
    sure, unsure, other = (
        found(1, 2, 3, second=9, by=2.0),
        found(1, 2, 3, second=9, by=0.01),
        found(1, 9, 4, second=2, by=0.01),
    )
    assert checks.compare_runs([sure], [sure], 0.1) == {"equal": 1, "ties": 0, "different": 0}
    assert checks.compare_runs([unsure], [other], 0.1) == {"equal": 0, "ties": 1, "different": 0}
    assert checks.compare_runs([sure], [other], 0.1) == {"equal": 0, "ties": 0, "different": 1}
    assert checks.compare_runs([other], [sure], 0.1) == {"equal": 0, "ties": 0, "different": 1}
    unheard_of = found(1, 7, 4, second=8, by=0.01)
    assert checks.compare_runs([unsure], [unheard_of], 0.1)["different"] == 1


@pytest.mark.parametrize("fault", ["scale", "mask", "slots", "norm", "block table", "copy", "nan", "raises"])
def test_a_faulty_operator_is_found(checks: Any, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the classic faults of a backend, put into the reference's own operators."""
    import dataclasses

    import npu_operators
    from gpu_engine import Setup

    from nanovllm.ops import reference, torch_operators

    right = torch_operators("reference")

    def attend(q: Any, k: Any, v: Any, meta: Any, scale: float, window: int | None) -> Any:
        if fault == "scale":
            scale = 1.0
        if fault == "block table":
            meta = dataclasses.replace(meta, block_table=meta.block_table.roll(1, 1))
        if fault == "mask":
            meta = dataclasses.replace(meta, seq_lens=[max(1, length - 1) for length in meta.seq_lens])
        return reference.paged_attention(q, k, v, meta, scale, window)

    def write(*arguments: Any) -> Any:
        changed = list(arguments)
        if fault == "slots":
            changed[8] = changed[8].roll(1)
        if fault == "norm":
            changed[1], changed[2] = changed[2], changed[1]
        return reference.norm_rotate_write(*changed)

    def copy(caches: Any, sources: Any, targets: Any) -> None:
        if fault == "raises":
            raise RuntimeError("error 507015")
        if fault != "copy":
            reference.copy_blocks(caches, sources, targets)

    def silu(x: Any) -> Any:
        return reference.silu_and_mul(x) * (float("nan") if fault == "nan" else 1.0)

    faulty = dataclasses.replace(
        right, paged_attention=attend, norm_rotate_write=write, silu_and_mul=silu, copy_blocks=copy
    )
    setup = Setup("cpu", True, {}, ROOT, None, None)
    monkeypatch.setattr(npu_operators, "operator_table", lambda device: right)
    assert checks.operators(setup)["passed"]
    monkeypatch.setattr(npu_operators, "operator_table", lambda device: faulty)
    found = checks.operators(setup)
    assert not found["passed"] and (fault == "raises") == bool(found["raised"])
    assert found["rms_norm"] < 1e-5  # the others are judged all the same
