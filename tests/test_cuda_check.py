"""The command that checks and measures a GPU works; on a CPU its figures mean nothing and are not judged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cuda_device import DEVICE, ON_GPU  # before Triton
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import torch  # noqa: E402
from attention_libraries import attend, from_pages  # noqa: E402
from fake_gpu import FakeCapture, FakeGpu, fake_operators  # noqa: E402
from gpu_check import CHECKS, FIGURES, SECONDS, goals  # noqa: E402
from gpu_engine import Setup  # noqa: E402
from gpu_nano_vllm import FlashAttention, TritonDecode, reads_pages  # noqa: E402
from gpu_trace import read_trace, recording  # noqa: E402
from isolated import Isolated  # noqa: E402
from parts import run  # noqa: E402
from test_cuda_attention import SCALE, make_batch  # noqa: E402
from workloads import TINY  # noqa: E402

from nanovllm.ops import reference  # noqa: E402

COMMAND = [sys.executable, "benchmarks/gpu_check.py", "--device", "cpu", "--quick"]
PARTS = ["prefix_cache", "out_of_memory", "abort", "neighbour", "waiting", "trace",
         "measured_limits", "attention", "nano_vllm_bench", "single_stream", "prefill", "batch_sweep",
         "recording", "quantised", "nano_vllm"]  # fmt: skip


def test_gpu_check_runs_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [*COMMAND, "--output", str(output), "--only", *PARTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(output.read_text())
    assert results["device"] and results["quick"] and results["machine"]["versions"]["torch"]
    assert all(results["checks"][name]["passed"] for name in PARTS[:6])
    bench = results["nano_vllm_bench"]
    assert bench["output_tokens_per_s"] > 0 and bench["ratio_to_nano_vllm"] is None
    share = bench["output_tokens_per_s"] / bench["limit_tokens_per_s"]
    assert abs(bench["ratio_to_limit"] - share) < 1e-6 * share
    assert set(results["batch_sweep"]) == {"1", "2", "seconds"}
    for figure in ("single_stream", "prefill"):
        assert "error" not in results[figure] and results[figure]["tokens_per_s"] > 0
    assert results["quantised"]["int8"]["output_tokens_per_s"] > 0 and "fp8" in results["quantised"]["fp8"]["refused"]
    assert results["checks"]["trace"]["launches"] >= 6 and "error" not in results["recording"]


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


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if ON_GPU or torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "benchmarks/gpu_check.py", "--output", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no cuda to check" in done.stderr


def test_every_part_has_a_limit_of_time() -> None:
    assert {"device", *CHECKS, *FIGURES} == set(SECONDS)


# ---- parts in processes of their own --------------------------------------------------------------------------------


def fine(setup: Setup) -> dict[str, Any]:
    return {"process": os.getpid(), "value": 1.5}


def raises(setup: Setup) -> dict[str, Any]:
    raise ValueError("an illegal memory access was encountered")


def crashes(setup: Setup) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def hangs(setup: Setup) -> dict[str, Any]:
    """It has started a process, as the operators' tests do."""
    child = subprocess.Popen(["sleep", "60"])
    (setup.model / "child").write_text(str(child.pid))
    time.sleep(60)
    return {}


def alive(pid: int) -> bool:
    """Whether a process still runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_crashes_or_hangs_takes_nothing_along(tmp_path: Path) -> None:
    setup = Setup("cpu", True, {}, tmp_path, None, None)
    parts = {"raises": raises, "crashes": crashes, "hangs": hangs, "fine": fine}
    noted: list[list[str]] = []
    call = Isolated(dict.fromkeys(parts, 4.0), 60)
    results = run("check", parts, setup, None, call, lambda found: noted.append(list(found)))
    assert "illegal memory access" in results["raises"]["error"]
    assert "SIGKILL" in results["crashes"]["error"]
    assert "ended after 4 s" in results["hangs"]["error"]
    assert [results[name]["passed"] for name in parts] == [False, False, False, True]
    assert results["fine"]["value"] == 1.5 and results["fine"]["process"] != os.getpid()
    assert noted == [list(parts)[: i + 1] for i in range(4)]  # each is written as soon as it is known
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        if not alive(child):
            break
        time.sleep(0.1)
    assert not alive(child)


def test_when_time_is_spent_nothing_is_begun(tmp_path: Path) -> None:
    setup = Setup("cpu", True, {}, tmp_path, None, None)
    results = run("figure", {"fine": fine}, setup, None, Isolated({"fine": 30}, 1.0))
    assert "not begun" in results["fine"]["error"]


# ---- what is told ----------------------------------------------------------------------------------------------------


def event(category: str, name: str, begin: float, length: float, thread: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": length, "tid": thread}


def test_a_trace_shows_what_waits_while_a_step_is_launched() -> None:
    events = [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", "launch a step", 100, 50),
        event("user_annotation", "launch a step", 300, 70),
        event("cuda_runtime", "cudaStreamSynchronize", 160, 20),  # between launches: the host fetches a result
        event("cuda_runtime", "cudaEventSynchronize", 110, 5, thread=2),
        event("cuda_runtime", "cudaLaunchKernel", 120, 3),
        event("kernel", "decode_kernel", 100, 40),
        event("kernel", "merge_kernel", 120, 40),  # beside it
        event("gpu_memcpy", "Memcpy DtoH", 180, 20),
    ]
    found = read_trace(events)
    assert found == {"launches": 2, "launch_us": 70, "waiting_calls": {}, "device_busy": 0.8, "longest_gap_us": 20}
    found = read_trace([*events, event("cuda_runtime", "cudaStreamSynchronize", 320, 9)])
    assert found["waiting_calls"] == {"cudaStreamSynchronize": 1}
    assert read_trace([])["device_busy"] is None


def test_goals_stand_beside_what_was_reached() -> None:
    results = {
        "nano_vllm_bench": {"output_tokens_per_s": 30_000.0, "ratio_to_limit": 0.5},
        "attention": {"triton": {"256 x 1k": {"of_copying": 0.85}}},
        "prefill": {"error": "ended after 25 s"},
        "start": {"second": {"first_token_s": 7.0}},
    }
    met = {place: each["met"] for place, each in goals(results).items()}
    assert met["nano_vllm_bench.output_tokens_per_s"] and met["attention.triton.256 x 1k.of_copying"]
    assert met["nano_vllm_bench.ratio_to_limit"] is False and met["start.second.first_token_s"] is False
    assert met["prefill.ratio_to_products"] is met["nano_vllm_bench.ratio_to_nano_vllm"] is None


# ---- Nano-vLLM's attention -------------------------------------------------------------------------------------------


def old_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """torch 2.11's."""
    assert scale is not None and window_size == (-1, 0) and query.shape[0] == cu_seq_q[-1]
    rows = [(key[a:b], value[a:b]) for a, b in pairwise(cu_seq_k.tolist())]
    return attend(query, rows, cu_seq_q.tolist(), scale, window_size)


def new_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    seqused_k: Tensor | None = None, block_table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """torch 2.12's and later."""
    assert enable_gqa
    if block_table is None:
        assert cu_seq_k is not None
        return old_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)
    assert seqused_k is not None and scale is not None and cu_seq_k is None
    rows = from_pages(key, value, block_table, seqused_k)
    return attend(query, rows, cu_seq_q.tolist(), scale, window_size)


def test_the_recording_of_all_sizes_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("nanovllm.platforms", "nanovllm.runner.model_runner"):
        monkeypatch.setattr(f"{module}.get_platform", lambda device: FakeGpu())
    monkeypatch.setattr("nanovllm.runner.model_runner.operator_table", fake_operators)
    monkeypatch.setattr("nanovllm.ops.cuda.graphs.CudaCapture", FakeCapture)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "num_hidden_layers": 1, "vocab_size": 100}))
    found = recording(Setup("cpu", True, TINY, tmp_path, None, None))
    assert set(found["rows"]) == {"1", "2", "4"} and found["seconds"] == sum(found["rows"].values()) > 0


@pytest.mark.parametrize("varlen", [old_varlen, new_varlen])
def test_nano_vllm_finds_flash_attention(varlen: Any) -> None:
    """Prompts of their own and behind a cached beginning, and decodes with a padded row, as Nano-vLLM calls it."""
    paged = reads_pages(varlen, DEVICE)
    assert paged == (varlen is new_varlen)
    flash = FlashAttention(varlen, paged, TritonDecode(4, 100_000))
    meta, q, k_cache, v_cache = make_batch([(300, 1), (9, 1), (0, 1)], head_dim=16, block_size=256, dtype=torch.float16)
    caches = k_cache.nan_to_num(), v_cache.nan_to_num()
    table = meta.block_table.int()
    lengths = torch.tensor(meta.seq_lens, dtype=torch.int32, device=DEVICE)
    wanted = reference.paged_attention(q.float(), caches[0].float(), caches[1].float(), meta, SCALE, None)
    options: dict[str, Any] = {"softmax_scale": SCALE, "causal": True}
    ours = flash.flash_attn_with_kvcache(q[:, None], *caches, cache_seqlens=lengths, block_table=table, **options)
    torch.testing.assert_close(ours[:, 0].float(), wanted, atol=3e-3, rtol=3e-3)

    meta, q, k_cache, v_cache = make_batch([(270, 5), (0, 7)], head_dim=16, block_size=256, dtype=torch.float16)
    caches = k_cache.nan_to_num(), v_cache.nan_to_num()
    starts = torch.tensor(meta.query_start_loc, dtype=torch.int32, device=DEVICE)
    key_starts = torch.tensor([0, 275, 282], dtype=torch.int32, device=DEVICE)
    options |= {"max_seqlen_q": 7, "cu_seqlens_q": starts, "max_seqlen_k": 275, "cu_seqlens_k": key_starts}
    wanted = reference.paged_attention(q.float(), caches[0].float(), caches[1].float(), meta, SCALE, None)
    table = meta.block_table.int()
    ours = flash.flash_attn_varlen_func(q, *caches, block_table=table, **options)
    torch.testing.assert_close(ours.float(), wanted, atol=3e-3, rtol=3e-3)
    slots = torch.cat(
        [table[row, p // 256] * 256 + p % 256 for row, p in ((0, torch.arange(275)), (1, torch.arange(7)))]
    )
    alone = [cache.flatten(0, 1)[slots] for cache in caches]
    ours = flash.flash_attn_varlen_func(q, *alone, block_table=None, **options)
    torch.testing.assert_close(ours.float(), wanted, atol=3e-3, rtol=3e-3)


CHECKOUT = {
    "__init__.py": """
from nanovllm.engine.llm import LLM
class SamplingParams:
    def __init__(self, **options):
        self.__dict__.update(options)
        assert options.keys() == {"temperature", "ignore_eos", "max_tokens"}
""",
    "engine/__init__.py": "",
    "engine/model_runner.py": """
import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
def load_model(model, path):
    raise FileNotFoundError("there are no weights")
def run():
    load_model(torch.nn.Linear(2, 2), "")
    q, cache = torch.randn(2, 1, 4, 16).half(), torch.randn(3, 256, 2, 16).half()
    table, lengths = torch.tensor([[1, -1], [2, -1]]).int(), torch.tensor([9, 0]).int()
    options = {"cache_seqlens": lengths, "block_table": table, "softmax_scale": 0.2, "causal": True}
    out = flash_attn_with_kvcache(q, cache, cache, **options)
    assert out.shape == q.shape and out.isfinite().all() and not out[1].any()
""",
    "engine/llm.py": """
from transformers import AutoTokenizer
from nanovllm.engine import model_runner
class LLM:
    def __init__(self, model, enforce_eager, max_model_len):
        assert AutoTokenizer.from_pretrained(model, use_fast=True).eos_token_id == 2
        model_runner.run()
        self.met = set()
    def generate(self, prompts, params, use_tqdm):
        assert not self.met & {tuple(prompt) for prompt in prompts}, "the prefix cache would find these"
        self.met |= {tuple(prompt) for prompt in prompts}
""",
}


def test_nano_vllm_runs_from_a_checkout(tmp_path: Path) -> None:
    """Its package takes the place of ours; weights, tokenizer and flash-attn are provided."""
    for name, source in CHECKOUT.items():
        file = tmp_path / "nanovllm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    code = f"""
import runpy, sys, types, torch
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch.nn.attention.varlen
from test_cuda_check import old_varlen
torch.nn.attention.varlen.varlen_attn = old_varlen
torch.cuda.get_device_properties = lambda _: types.SimpleNamespace(multi_processor_count=4)
torch.cuda.synchronize = lambda: None
sys.argv = ["gpu_nano_vllm.py", {str(tmp_path)!r}, {str(tmp_path)!r}]
runpy.run_path({str(ROOT / "benchmarks/gpu_nano_vllm.py")!r}, run_name="__main__")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["output_tokens_per_s"] * result["seconds"] == pytest.approx(133_966)  # the published number of tokens
    assert result["attention"] == "torch varlen, decodes on our Triton kernels"
