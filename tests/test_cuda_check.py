"""The command that checks and measures a GPU works; on a CPU its figures mean nothing and are not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "benchmarks/gpu_check.py", "--device", "cpu", "--quick"]
PARTS = ["prefix_cache", "out_of_memory", "abort", "measured_limits", "attention", "nano_vllm_bench", "single_stream",
         "prefill", "batch_sweep"]  # fmt: skip


def test_gpu_check_runs_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [*COMMAND, "--output", str(output), "--only", *PARTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(output.read_text())
    assert results["device"] and results["quick"] and results["machine"]["versions"]["torch"]
    assert all(results["checks"][name]["passed"] for name in ("prefix_cache", "out_of_memory", "abort"))
    bench = results["nano_vllm_bench"]
    assert bench["output_tokens_per_s"] > 0 and bench["ratio_to_nano_vllm"] is None
    share = bench["output_tokens_per_s"] / bench["limit_tokens_per_s"]
    assert abs(bench["ratio_to_limit"] - share) < 1e-6 * share
    assert set(results["batch_sweep"]) == {"1", "2", "seconds"}
    for figure in ("single_stream", "prefill"):
        assert "error" not in results[figure] and results[figure]["tokens_per_s"] > 0


def test_what_fails_is_noted_and_the_rest_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [*COMMAND, "--output", str(output), "--attention-backend", "nonsense"]
    done = subprocess.run(
        [*command, "--only", "abort", "attention", "measured_limits"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "checks failed: abort" in done.stdout
    results = json.loads(output.read_text())
    assert not results["checks"]["abort"]["passed"] and "nonsense" in results["checks"]["abort"]["error"]
    assert "error" in results["attention"] and results["measured_limits"]["bytes_per_s"] > 0
