"""The benchmarks run and write results that say where and when they were measured. Their figures are not judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from startup import measure  # noqa: E402
from workloads import QWEN3_0_6B, limits, parameters, workloads  # noqa: E402


def run_benchmark(name: str, output: Path, *options: str, without: str = "") -> dict[str, Any]:
    command = [sys.executable, f"benchmarks/{name}.py", *options, "--output", str(output)]
    environment = {key: value for key, value in os.environ.items() if key != without}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert results["command"].startswith(f"python benchmarks/{name}.py") and results["date"][:2] == "20"
    assert results["machine"]["cpu"] and results["machine"]["versions"]["torch"]
    return results


def test_host_cost(tmp_path: Path):
    results = run_benchmark("host_cost", tmp_path / "out.json", "--steps", "5", "--running", "1", "4", "--waiting", "9")
    rows = [(row["running"], row["waiting"], row["history"]) for row in results["decode_step"][::2]]
    assert rows == [(1, 0, 128), (4, 0, 128), (1, 9, 128), (4, 9, 128), (4, 0, 4096)]
    for row in results["decode_step"]:
        assert 0 < row["schedule_ms"] + row["update_ms"] + row["output_ms"] < 2 * row["step_ms"]
    assert [row["requests"] for row in results["whole_life"]] == [4, 4, 9, 9]


def test_cpu_peers(tmp_path: Path):
    pytest.importorskip("transformers")
    options = ["--shape", "tiny", "--scale", "0.1", "--rounds", "1", "--workloads", "bs1", "batch",
               "--models", str(tmp_path),
               "--engines", "nanovllm bf16", "nanovllm int4", "transformers bf16", "llama.cpp q4_0"]  # fmt: skip
    results = run_benchmark("cpu_peers", tmp_path / "out.json", *options, without="NANOVLLM_PEER_LLAMA_CPP")
    assert list(results["tokens_per_second"]) == ["nanovllm bf16", "nanovllm int4", "transformers bf16"]
    for speeds in results["tokens_per_second"].values():
        assert speeds["bs1"] > 0 and speeds["batch"] > 0
    assert results["limits"]["bandwidth"] > 0 and results["limits"]["flops"] > 0
    assert results["ratios"]["nanovllm bf16, bs1, over transformers bf16"] > 0
    assert "no Python given" in results["skipped"]["llama.cpp q4_0"]
    most = results["limits"]["tokens_per_second"]
    assert most["nanovllm int4"]["bs1"] == pytest.approx(most["nanovllm bf16"]["bs1"] * 16 / 4.25)


def test_a_peer_nobody_knows_is_an_error(tmp_path: Path):
    with pytest.raises(AssertionError, match="NAME=PYTHON"):
        run_benchmark("cpu_peers", tmp_path / "out.json", "--peer", "other=python")


def test_constrained(tmp_path: Path):
    options = ["--rounds", "1", "--steps", "3", "--rows", "4", "--constrained", "2"]
    results = run_benchmark("constrained", tmp_path / "out.json", *options)
    assert results["rows"] == 4 and all(each["best_ms"] > 0 for each in results["figures"].values())


def test_serve_overhead(tmp_path: Path):
    options = ["--rounds", "1", "--streams", "4", "--input-len", "8", "--output-len", "6", "--only", "throughput,delay"]
    results = run_benchmark("serve_overhead", tmp_path / "out.json", *options)
    assert set(results["throughput"]["cpu_seconds"]) == {"front", "engine", "client"}
    assert len(results["throughput"]["rounds"]) == 1 and results["throughput"]["ratio"] > 0
    for place in ("to the socket", "to the client"):
        delay = results["delay"][place]
        assert 0 < delay["p50"] <= delay["p99"]


def test_metrics_scrape(tmp_path: Path):
    results = run_benchmark("metrics_scrape", tmp_path / "out.json", "--streams", "0", "3", "--scrapes", "4")
    idle, busy = results["rows"]
    assert (idle["live"], busy["live"]) == (0, 3) and idle["tokens_per_s"] == 0 < busy["tokens_per_s"]
    for row in (idle, busy):
        assert row["inside_ms"] > 0 and 0 < row["p50_ms"] <= row["p95_ms"] <= row["max_ms"]


def test_online(tmp_path: Path):
    results = run_benchmark("online", tmp_path / "out.json", "--shape", "tiny", "--scale", "0.05")
    assert list(results["figures"]) == ["nanovllm"] and results["ready_after"]["nanovllm"][0] > 0
    for load, count in (("1", 1), ("8", 8)):
        [figures] = results["figures"]["nanovllm"][load]
        assert figures["completed"] == count and figures["failed"] == 0
        assert figures["total_input_tokens"] == 13 * count and figures["total_output_tokens"] == 6 * count
        assert 0 < figures["mean_ttft_ms"] <= figures["mean_e2el_ms"]  # a short answer may come in one piece


def test_cpu_context(tmp_path: Path):
    pytest.importorskip("transformers")
    options = ["--shape", "tiny", "--lengths", "20", "300", "--tokens", "4", "--models", str(tmp_path)]
    results = run_benchmark("cpu_context", tmp_path / "out.json", *options)
    assert [row["length"] for row in results["rows"]] == [20, 300]
    for row in results["rows"]:
        assert row["prefill"] > 0 and row["decode"] > 0 and row["prefill_limit"] > 0 and row["decode_limit"] > 0
    assert results["memory"] == results["weights"] + results["cache"] + results["other"] >= results["memory_ready"] > 0
    assert results["ready"] > 0


def test_cpu_decode(tmp_path: Path):
    pytest.importorskip("transformers")
    options = ["--shape", "tiny", "--rounds", "3", "--models", str(tmp_path)]
    results = run_benchmark("cpu_decode", tmp_path / "out.json", *options)
    assert len(results["bandwidth"]) == len(results["step"]) == 3
    assert min(results["bandwidth"]) > 0 and min(results["step"]) > 0 and results["share"] > 0


def test_quantisation_quality(tmp_path: Path):
    options = ["--models", "demo", "--questions", "3", "--length", "6"]
    results = run_benchmark("quantisation_quality", tmp_path / "out.json", *options)["results"]["demo"]
    assert list(results) == ["bfloat16", "int8", "w8a8", "int4"]
    assert results["bfloat16"]["top-1 agreement"] == results["bfloat16"]["same answers"] == 1
    assert results["int8"]["perplexity"] == pytest.approx(results["bfloat16"]["perplexity"], rel=0.05)


def test_startup_sees_the_first_byte_before_the_end():
    first, whole = measure([sys.executable, "-c", "import time; print('x', flush=True); time.sleep(0.3)"])
    assert first is not None and 0 < first < whole - 0.2
    assert measure([sys.executable, "-c", "pass"])[0] is None


def test_workloads_are_those_the_figures_speak_of():
    works = workloads()
    assert [len(works["bs1"].prompts[0]), *works["bs1"].output_lens] == [32, 64]
    assert [len(works["prefill"].prompts[0]), *works["prefill"].output_lens] == [1024, 1]
    assert len(works["batch"].prompts) == 32
    assert all(64 <= len(prompt) <= 256 for prompt in works["batch"].prompts)
    assert all(32 <= length <= 96 for length in works["batch"].output_lens)


def test_limits_of_a_known_machine():
    layers, embedding = parameters(QWEN3_0_6B)
    assert layers + embedding == pytest.approx(596e6, rel=0.001)  # what the model's name says
    most = limits(QWEN3_0_6B, 1.0, bandwidth=44e9, flops=1e12)
    assert most["bs1"] == pytest.approx(44e9 / (2 * 596e6), rel=0.01)
    assert most["prefill"] == pytest.approx(1000, rel=0.05)
