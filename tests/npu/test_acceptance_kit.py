"""What an owner of an NPU runs, rehearsed on the emulated one: ``npu_check.py`` and ``nanovllm doctor``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def check(output: Path, *parts: str) -> dict:
    """The file that npu_check.py writes; it must say that everything passed."""
    command = [sys.executable, "benchmarks/npu_check.py", "--quick", "--output", str(output), "--only", *parts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text())


@pytest.mark.emulated
def test_npu_check_passes_on_an_atlas_a2(tmp_path: Path) -> None:
    results = check(tmp_path / "npu.json", "doctor", "operators", "tokens", "graphs", "prefix_cache", "ranks")
    checks = results["checks"]
    assert results["device"] == "Ascend910B2" and checks["doctor"]["emulated"]
    assert {"linear", "linear_parts", "linear, weights in 8 bits", "keep_likeliest"} <= set(checks["operators"])
    assert {"copy_blocks, heads of 64", "paged_attention, heads of 128"} <= set(checks["operators"])
    assert checks["tokens"]["different"] == checks["graphs"]["different"] == checks["prefix_cache"]["different"] == 0
    assert checks["ranks"]["ranks"] == 2


@pytest.mark.emulated(soc="Ascend310P3")
def test_npu_check_runs_on_a_310p(tmp_path: Path) -> None:
    results = check(tmp_path / "npu.json", "tokens", "prefix_cache")
    assert results["device"] == "Ascend310P3" and results["checks"]["tokens"]["different"] == 0


@pytest.mark.emulated
def test_the_doctor_loads_torch_npu_and_says_that_it_is_emulated() -> None:
    command = [sys.executable, "-m", "nanovllm", "doctor", "--device", "npu", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 0 and findings["import torch_npu"]["what"].startswith("Ascend910B2")
    assert findings["Ascend"]["level"] == "warning" and "emulated" in findings["Ascend"]["what"]
