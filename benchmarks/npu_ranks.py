"""Collectives between all devices of this host, for npu_check.py: the engine's own process group, a rank each."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import time
from typing import Any

import torch
from gpu_engine import Setup

from nanovllm.parallel.process_group import MeetingPoint, process_group
from nanovllm.platforms import get_platform

_MOST = 8
_PATIENCE = 180  # seconds for all that the ranks do


def ranks(setup: Setup) -> dict[str, Any]:
    """Every rank must find the sums and the parts that all have given; how many bytes a second an all-reduce sums."""
    count = 2 if setup.device == "cpu" else min(_MOST, torch.get_device_module(setup.device).device_count())
    if count < 2:
        return {"passed": True, "ranks": count, "note": "one device: nothing to connect"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    numbers = setup.few(16 << 20, 1 << 16)
    work = [context.Process(target=_rank, args=(setup.device, i, count, port, numbers, answers)) for i in range(count)]
    for process in work:
        process.start()
    try:
        found = [answers.get(timeout=_PATIENCE) for _ in work]
    except queue.Empty:
        found = [{"error": f"no answer for {_PATIENCE} s; exit codes {[process.exitcode for process in work]}"}]
    for process in work:
        process.join(10)
        if process.is_alive():
            process.kill()
    errors = [answer["error"] for answer in found if "error" in answer]
    if errors:
        return {"passed": False, "ranks": count, "errors": errors}
    slowest = min(answer["bytes_per_second"] for answer in found)
    return {"passed": all(answer["right"] for answer in found), "ranks": count, "all_reduce_bytes_per_second": slowest}


def _rank(device: str, rank: int, world: int, port: int, numbers: int, answers: Any) -> None:
    try:
        get_platform(device).load()
        where = MeetingPoint(os.environ.get("MASTER_ADDR") or MeetingPoint.address, port, _PATIENCE // 2)
        with process_group(device, rank, world, where) as context:
            x = torch.full((numbers,), float(rank + 1), device=device)
            total = context.all_reduce(x)[:: max(1, numbers // 64)].tolist()
            parts = context.all_gather(torch.tensor([[float(rank)]], device=device)).tolist()
            started, times = time.perf_counter(), 5
            for _ in range(times):
                context.all_reduce(x)
            x[:1].item()
            seconds = (time.perf_counter() - started) / times
        right = set(total) == {world * (world + 1) / 2} and parts == [[float(i) for i in range(world)]]
        answers.put({"right": right, "bytes_per_second": round(4 * numbers / seconds)})
    except Exception as error:
        answers.put({"error": f"rank {rank}: {type(error).__name__}: {error}"})
