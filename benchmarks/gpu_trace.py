"""What a profiler sees of decode steps: whether their launch waits for the device, and how busy the device is; and how
long the steps of all sizes take to record."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from gpu_engine import Setup, fixed, free_memory, generate
from torch.profiler import ProfilerActivity, profile, record_function

from nanovllm.ops.graphs import BUCKETS, DecodeGraphs

_LAUNCH = "launch a step"
_WAITING = ("StreamSynchronize", "DeviceSynchronize", "CtxSynchronize", "EventSynchronize", "StreamWaitValue")
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


def trace(setup: Setup) -> dict[str, Any]:
    """Decode steps of several requests under torch's profiler: no call that waits while a step is launched."""
    rows, steps = setup.few(64, 2), setup.few(40, 6)
    prompts = [[5 + row] * 16 for row in range(rows)]
    with setup.engine(max_num_seqs=rows, enable_prefix_caching=False) as llm:
        generate(llm, prompts, fixed(steps, 0.7))  # kernels and graphs are made
        runner = llm.llm_engine.core.executor._runner
        launch = runner.launch

        def labelled(plan: Any) -> Any:
            with record_function(_LAUNCH):
                return launch(plan)

        runner.launch = labelled
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setup.on_gpu else [])]
        with profile(activities=activities) as profiler:
            generate(llm, prompts, fixed(steps, 0.7))
    free_memory()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        found = read_trace(json.loads(file.read_text())["traceEvents"])
    busy = found["device_busy"]
    return {"passed": not found["waiting_calls"] and found["launches"] >= steps and (busy is None or busy > 0), **found}


def read_trace(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What a Chrome trace of torch's profiler says of launches.

    ``waiting_calls``: calls that wait for the device while a step is launched, with how often they do.
    ``device_busy``: the share of the time, from the first work of the device to its last, in which it has some; None
    without a device. ``longest_gap_us``: in which it has none. ``launch_us``: the median launch.
    """
    spans: list[tuple[float, float, Any]] = []
    calls: list[tuple[float, str, Any]] = []
    work: list[tuple[float, float]] = []
    for event in events:
        if event.get("ph") != "X":
            continue
        begin, kind = float(event["ts"]), event.get("cat", "")
        if kind in _DEVICE_WORK:
            work.append((begin, begin + float(event["dur"])))
        elif event["name"] == _LAUNCH and kind == "user_annotation":
            spans.append((begin, begin + float(event["dur"]), event["tid"]))
        elif kind in ("cuda_runtime", "cuda_driver") and event["name"].endswith(_WAITING):
            calls.append((begin, event["name"], event["tid"]))
    waiting: dict[str, int] = {}
    for at, name, thread in calls:
        if any(begin <= at <= end and thread == of for begin, end, of in spans):
            waiting[name] = waiting.get(name, 0) + 1
    lengths = sorted(end - begin for begin, end, _ in spans)
    busy, gap = _busy(work)
    return {
        "launches": len(spans),
        "launch_us": lengths[len(lengths) // 2] if lengths else None,
        "waiting_calls": waiting,
        "device_busy": busy,
        "longest_gap_us": gap,
    }


def _busy(work: list[tuple[float, float]]) -> tuple[float | None, float | None]:
    """The share of the time from the first work to the last in which there is some, and the longest gap."""
    if not work:
        return None, None
    work.sort()
    first, reached = work[0][0], work[0][0]
    idle = longest = 0.0
    for begin, end in work:
        gap = max(0.0, begin - reached)
        idle, longest = idle + gap, max(longest, gap)
        reached = max(reached, end)
    return 1.0 - idle / (reached - first), longest


def recording(setup: Setup) -> dict[str, Any]:
    """Seconds to record decode steps of all sizes, and what they hold; by number of rows."""
    most = setup.few(max(BUCKETS), 4)
    with setup.engine(max_num_seqs=most, enable_prefix_caching=False) as llm:
        forward: Any = llm.llm_engine.core.executor._runner.forward
        if not isinstance(forward, DecodeGraphs):
            return {"skipped": "this device records nothing"}
        before = torch.cuda.memory_reserved() if setup.on_gpu else 0
        sizes: dict[str, float] = {}
        record = forward._record

        def timed(graph: Any, size: int, table: Any) -> Any:
            setup.synchronize()
            started = time.perf_counter()
            work = record(graph, size, table)
            setup.synchronize()
            sizes[str(size)] = time.perf_counter() - started
            return work

        forward._record = timed  # type: ignore[method-assign]
        generate(llm, [[5]] * most, [fixed(2 + i) for i in range(most)])  # requests leave one by one
        held = (torch.cuda.memory_reserved() if setup.on_gpu else 0) - before
    free_memory()
    return {"seconds": sum(sizes.values()), "bytes": held, "rows": sizes}
