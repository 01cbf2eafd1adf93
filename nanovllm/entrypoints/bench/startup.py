"""Start-up time: from starting a process to an engine that can take its first request, over and over.

Nothing is compiled when an engine starts; a cold start differs from a warm one in that the model's files are read from
the disk instead of from memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanovllm.errors import ModelError, ParameterError

PERCENTAGES = (10, 25, 50, 75, 90, 99)
WIDTH = 60

# What runs in the process that is timed. Errors a user can mend come back as text.
_CHILD = """
import json, sys
from nanovllm.errors import ModelError, ParameterError
try:
    from nanovllm.entrypoints.cli.loading import load_llm
    llm = load_llm(json.loads(sys.argv[1]))
    print("ready", flush=True)
    sys.stdin.read()
    llm.close()
except (ModelError, ParameterError) as error:
    print("error", json.dumps(str(error)), flush=True)
"""


@dataclass(frozen=True, slots=True)
class StartupResult:
    """What was measured.

    Attributes:
        cold: seconds of each start from the disk.
        warm: seconds of each start from memory.
    """

    cold: list[float]
    warm: list[float]

    def __str__(self) -> str:
        """vLLM's lines."""
        lines = ["=" * WIDTH, "STARTUP TIME BENCHMARK RESULTS", "=" * WIDTH]
        for phase, times in (("COLD", self.cold), ("WARM", self.warm)):
            measured = {"Startup time": times, "Compilation time": [0.0] * len(times)}
            lines += ["", f"{phase} STARTUP:"]
            lines += [f"Avg {name.lower()}: {np.mean(values):.2f} seconds" for name, values in measured.items()]
            for name, values in measured.items():
                lines.append(f"{name} percentiles:")
                lines += [f"  {percentage}%: {value:.2f} seconds" for percentage, value in _percentiles(values).items()]
        return "\n".join([*lines, "=" * WIDTH])

    def to_json(self, model_id: str) -> dict[str, Any]:
        """vLLM's keys."""
        result: dict[str, Any] = {}
        for phase, times in (("cold", self.cold), ("warm", self.warm)):
            for key, values in ((f"{phase}_startup", times), (f"{phase}_compilation", [0.0] * len(times))):
                result[f"avg_{key}_time"] = float(np.mean(values))
                result[f"{key}_times"] = values
                result[f"{key}_percentiles"] = {str(p): value for p, value in _percentiles(values).items()}
        return result


def measure_startup(
    engine_args: Mapping[str, Any],
    folder: Path,
    *,
    num_cold: int = 3,
    num_warmups: int = 1,
    num_warm: int = 3,
    use_tqdm: bool = True,
) -> StartupResult:
    """Start the engine again and again, each time in a new process.

    Args:
        engine_args: keyword arguments of `LLM`.
        folder: the model's; its files are thrown out of memory before each cold start.

    Raises:
        ParameterError, ModelError: as `LLM`.
    """
    from tqdm import tqdm

    def repeat(count: int, title: str, cold: bool = False) -> list[float]:
        times = []
        for _ in tqdm(range(count), desc=title, dynamic_ncols=True, disable=not use_tqdm):
            if cold:
                forget_files(folder)
            times.append(start_once(engine_args))
        return times

    cold = repeat(num_cold, "Cold startup iterations", cold=True)
    repeat(num_warmups, "Warmup iterations")
    return StartupResult(cold, repeat(num_warm, "Warm startup iterations"))


def start_once(engine_args: Mapping[str, Any]) -> float:
    """Seconds from starting Python to an engine that is ready.

    Raises:
        ParameterError, ModelError: as `LLM`.
    """
    start = time.perf_counter()
    command = [sys.executable, "-c", _CHILD, json.dumps(dict(engine_args))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        word, _, detail = process.stdout.readline().strip().partition(" ")
        elapsed = time.perf_counter() - start
    if word == "ready":
        return elapsed
    if word == "error":
        raise ParameterError(json.loads(detail))
    raise ModelError(f"the engine's process ended with code {process.returncode}; its messages are above")


def forget_files(folder: Path) -> None:
    """Ask the operating system to drop a folder's files from memory. Does nothing where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in folder.iterdir():
        with contextlib.suppress(OSError), file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _percentiles(values: list[float]) -> dict[int, float]:
    return {percentage: float(np.percentile(values, percentage)) for percentage in PERCENTAGES}
