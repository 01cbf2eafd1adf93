"""Two processes and the wheel's own HCCL process group over the emulated library."""

import multiprocessing
import os
import queue as queues
from collections.abc import Callable

import pytest
import torch

pytestmark = pytest.mark.emulated


def _in_rank(rank: int, port: int, work: Callable, results: multiprocessing.Queue) -> None:
    import torch.distributed as dist
    import torch_npu

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), HCCL_EXEC_TIMEOUT="30")
    torch_npu.npu.set_device(rank)
    dist.init_process_group("hccl", rank=rank, world_size=2)
    try:
        results.put((rank, work(rank, dist)))
    except Exception as error:
        results.put((rank, f"{type(error).__name__}: {error}"))
    finally:
        dist.destroy_process_group()


def run_ranks(work: Callable) -> list:
    """``work(rank, dist)`` in two processes; their results by rank."""
    import socket

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
