"""Questions that are put to another Python: a broken library may raise, hang or kill whoever loads it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

TORCH = """
import json, torch
devices = []
if torch.cuda.is_available():
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        devices.append(f"{p.name}, {p.total_memory / 2**30:.1f} GiB, compute capability {p.major}.{p.minor}")
print(json.dumps({
    "version": torch.__version__,
    "CUDA build": torch.version.cuda,
    "CUDA devices": devices,
    "threads": torch.get_num_threads(),
    "CPU capability": torch.backends.cpu.get_cpu_capability(),
    "oneDNN": torch.backends.mkldnn.is_available(),
    "build": " ".join(torch.__config__.show().partition("- Build settings")[0].split()),
}))
"""

NPU = """
import json, torch, torch_npu
count = torch.npu.device_count() if torch.npu.is_available() else 0
print(json.dumps({
    "version": torch_npu.__version__,
    "devices": [torch.npu.get_device_name(index) for index in range(count)],
}))
"""

# What the NVIDIA driver says, and what torch's files say of themselves; neither loads torch.
GPU = """
import json
from nanovllm.platforms import cuda_driver
print(json.dumps({
    "GPUs": [[gpu.name, list(gpu.capability)] for gpu in cuda_driver.visible_gpus()],
    "driver's CUDA": cuda_driver.driver_cuda_version(),
    "torch has CUDA": cuda_driver.torch_is_built_for_cuda(),
}))
"""

KERNELS = """
import json
from nanovllm.ops.cpu.library import load_library
from nanovllm.platforms.cpu import CpuPlatform, usable_cores
library = load_library()
print(json.dumps({
    "instruction set": None if library is None else library.instruction_set,
    "threads": CpuPlatform().set_threads(),
    "cores": usable_cores(),
}))
"""


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        value: the JSON object that was printed; None if there is none.
        failure: what went wrong, in a line; empty if nothing did.
        log: all of standard error.
    """

    value: dict[str, Any] | None
    failure: str = ""
    log: str = ""


def ask(code: str, autoload: bool = False, timeout: float = 120) -> Answer:
    """Run ``code`` in another Python, which prints a JSON object as its last line.

    Args:
        autoload: let torch load device plug-ins as this process's environment says. By default none is loaded by
            importing torch, and each is asked by itself.
        timeout: seconds.
    """
    environment = dict(os.environ) if autoload else {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return Answer(None, f"did not answer within {timeout:.0f} seconds")
    if done.returncode != 0:
        return Answer(None, _failure(done.returncode, done.stderr), done.stderr)
    try:
        return Answer(dict(json.loads(done.stdout.strip().splitlines()[-1])), "", done.stderr)
    except (IndexError, TypeError, ValueError):
        return Answer(None, f"answered with something else: {done.stdout[-200:]!r}", done.stderr)


def missing_libraries(log: str) -> list[str]:
    """Names of the shared libraries that the loader says it cannot find."""
    return re.findall(r"(lib[\w.+-]+\.so[.\d]*): cannot open shared object file", log)


def _failure(code: int, stderr: str) -> str:
    last = (stderr.strip().splitlines() or ["no message"])[-1]
    if code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}: {last}"
        except ValueError:  # a signal without a name
            pass
    return f"failed with exit code {code}: {last}"
