"""Two processes in the engine's process group: the wheel's own HCCL group over the emulated library."""

import json
import multiprocessing
import os
import queue as queues
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paged import make_metadata
from tiny_models import make_checkpoint

from nanovllm.errors import ParameterError
from nanovllm.models import build_model, load_weights
from nanovllm.ops import operator_table
from nanovllm.parallel import ParallelContext
from nanovllm.parallel.process_group import process_group
from nanovllm.platforms import get_platform
from nanovllm.runner.kv_cache import allocate

pytestmark = pytest.mark.emulated


def _in_rank(rank: int, port: int, work: Callable, results: multiprocessing.Queue) -> None:
    import torch.distributed as dist

    os.environ.update(MASTER_PORT=str(port), HCCL_EXEC_TIMEOUT="30")
    try:
        get_platform("npu").load()
        with process_group("npu", rank, 2):
            results.put((rank, work(rank, dist)))
    except Exception as error:
        results.put((rank, f"{type(error).__name__}: {error}"))


def run_ranks(work: Callable) -> list:
    """``work(rank, dist)`` in two processes; their results by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_in_rank, args=(rank, port, work, results)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=240) for _ in processes)
    except queues.Empty:
        pytest.fail(f"no answer; exit codes {[process.exitcode for process in processes]}")
    finally:
        for process in processes:
            process.join(30)
            if process.is_alive():
                process.kill()
    return [found[rank] for rank in range(2)]


def _collectives(rank: int, dist: object) -> dict:
    device = f"npu:{rank}"
    answers = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64):
        x = torch.arange(5, device=device).to(dtype) + 10 * rank
        dist.all_reduce(x)
        answers[f"sum {dtype}"] = x.tolist()
    x = torch.tensor([float(rank), 5.0], device=device)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    answers["max"] = x.tolist()
    gathered = torch.empty(2, 3, device=device)
    dist.all_gather_into_tensor(gathered, torch.full((3,), float(rank), device=device))
    answers["gather"] = gathered.tolist()
    parts = torch.empty(2, device=device)
    dist.reduce_scatter_tensor(parts, torch.arange(4.0, device=device) + rank)
    answers["scatter"] = parts.tolist()
    told = torch.full((2,), 7.0 + rank, device=device)
    dist.broadcast(told, src=1)
    answers["broadcast"] = told.tolist()
    swapped = torch.empty(2, device=device)
    dist.all_to_all_single(swapped, torch.tensor([10.0 * rank, 10.0 * rank + 1], device=device))
    answers["to all"] = swapped.tolist()
    large = torch.ones(3 << 20, device=device)
    dist.all_reduce(large)
    answers["large"] = [large.min().item(), large.max().item()]
    dist.barrier()
    return answers


def test_collectives() -> None:
    answers = run_ranks(_collectives)
    for rank, found in enumerate(answers):
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64):
            assert found[f"sum {dtype}"] == [10, 12, 14, 16, 18]
        assert found["max"] == [1.0, 5.0]
        assert found["gather"] == [[0.0] * 3, [1.0] * 3]
        assert found["scatter"] == [[1.0, 3.0], [5.0, 7.0]][rank]
        assert found["broadcast"] == [8.0, 8.0]
        assert found["to all"] == [[0.0, 10.0], [1.0, 11.0]][rank]
        assert found["large"] == [2.0, 2.0]


def _disagree(rank: int, dist: object) -> str:
    x = torch.ones(4 + rank, device=f"npu:{rank}")
    dist.all_reduce(x)
    torch.npu.synchronize()
    return "no error"


def test_ranks_that_disagree_are_told() -> None:
    for answer in run_ranks(_disagree):
        assert "HCCL: rank" in answer, answer


def test_more_ranks_than_devices_are_refused() -> None:
    needed = r"3 ranks need 3 devices, 2 are visible \(ASCEND_RT_VISIBLE_DEVICES"
    with pytest.raises(ParameterError, match=needed), process_group("npu", 0, 3):
        pass
    assert not torch.distributed.is_initialized()


# ---- a model over two ranks -----------------------------------------------------------------------------------------


class _Decodes:
    """A prompt of two rows and a decode of both, of a model of which a rank holds its share."""

    def __init__(self, path: Path, device: str, parallel: ParallelContext) -> None:
        self.device = device
        config = json.loads((path / "config.json").read_text())
        self.model = build_model(
            config,
            config["architectures"][0],
            dtype=torch.float16,
            device=device,
            ops=operator_table("npu"),
            parallel=parallel,
            max_model_len=128,
        )
        load_weights(self.model, path, "auto", 0)
        self.caches = allocate(self.model, 8, 128, torch.device(device))

    @torch.inference_mode()
    def run(self) -> list:
        logits = []
        for contexts, news, ids, positions in (
            ([0, 0], [3, 2], [5, 9, 17, 7, 3], [0, 1, 2, 0, 1]),
            ([3, 2], [1, 1], [4, 6], [3, 2]),
        ):
            meta: Any = make_metadata([[1], [2]], contexts, news, 128)
            meta.block_table, meta.slot_mapping = meta.block_table.to(self.device), meta.slot_mapping.to(self.device)
            tokens, where = (torch.tensor(values, device=self.device) for values in (ids, positions))
            hidden = self.model.forward(tokens, where, self.caches, meta)
            logits.append(self.model.compute_logits(hidden).cpu().tolist())
        return logits


def _share_of_a_model(rank: int, dist: object) -> list:
    return _Decodes(Path(os.environ["SHARED_MODEL"]), f"npu:{rank}", ParallelContext(rank, 2)).run()


def test_a_model_over_two_ranks_gives_the_logits_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=128, num_hidden_layers=2)
    make_checkpoint(tmp_path, "qwen3", dtype=torch.float16, **sizes)
    monkeypatch.setenv("SHARED_MODEL", str(tmp_path))
    wanted = _Decodes(tmp_path, "npu:0", ParallelContext()).run()
    for found in run_ranks(_share_of_a_model):
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=2e-2, rtol=2e-2)
