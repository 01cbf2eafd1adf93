"""Where the emulated Ascend lives, and the variables a process needs to run on it.

The torch-npu wheel is installed into a folder of its own, never into the running environment: merely being importable,
it loads itself with torch and fails where there is no CANN. A process gets it through PYTHONPATH, and the emulated CANN
through LD_LIBRARY_PATH; its children inherit both.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

TORCH_NPU = "2.13.0"
ROOT = Path(__file__).resolve().parents[3]


def home() -> Path:
    """The folder of the wheel and the libraries: ``NANOVLLM_NPU_HOME``, or ``build/npu`` in the checkout."""
    return Path(os.environ.get("NANOVLLM_NPU_HOME") or ROOT / "build" / "npu")


def wheel_folder() -> Path:
    return home() / f"torch-npu-{TORCH_NPU}-{sys.implementation.cache_tag}"


def why_not() -> str | None:
    """What keeps the emulation from running here, or None."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"the emulated Ascend needs Linux on x86-64, not {sys.platform} on {platform.machine()}"
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            return f"the emulated Ascend needs {tool}"
    torch_version = importlib.metadata.version("torch").split("+")[0]
    if torch_version.rsplit(".", 1)[0] != TORCH_NPU.rsplit(".", 1)[0]:
        return f"torch-npu {TORCH_NPU} needs torch {TORCH_NPU}, found {torch_version}"
    return None if (wheel_folder() / "torch_npu").is_dir() else _install_wheel()


def _install_wheel() -> str | None:
    if os.environ.get("NANOVLLM_NPU_DOWNLOAD", "1") == "0":
        return f"no torch-npu in {wheel_folder()}, and NANOVLLM_NPU_DOWNLOAD=0 forbids to download it"
    partial = wheel_folder().with_name(f"{wheel_folder().name}.{os.getpid()}")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--retries", "1", "--target", str(partial)]
    try:
        result = subprocess.run([*command, f"torch-npu=={TORCH_NPU}"], capture_output=True, text=True, timeout=600)
        failure = result.returncode and (result.stderr.strip().splitlines() or ["pip failed"])[-1]
        if not failure and not wheel_folder().exists():
            partial.rename(wheel_folder())
    except subprocess.TimeoutExpired as error:
        failure = str(error)
    shutil.rmtree(partial, ignore_errors=True)
    return f"torch-npu {TORCH_NPU} (44 MB) could not be downloaded: {failure}" if failure else None


def variables(**settings: object) -> dict[str, str]:
    """The environment of a process on the emulated Ascend. ``settings`` are those of README.md: ``lazy=1``."""
    from .build import libraries

    environment = dict(os.environ)
    for name, first in (("PYTHONPATH", (wheel_folder(), ROOT)), ("LD_LIBRARY_PATH", (libraries(),))):
        paths = [str(path) for path in first]
        environment[name] = os.pathsep.join(paths + [path for path in [os.environ.get(name)] if path])
    environment.update(
        # Operators run in the thread that calls them. With torch_npu's queue thread, Python kernels would wait for the
        # interpreter lock of a thread that waits for the queue.
        TASK_QUEUE_ENABLE="0",
        NANOVLLM_NPU_EMULATED="1",
    )
    environment.pop("ASCEND_RT_VISIBLE_DEVICES", None)
    environment.update({f"EMULATED_NPU_{name.upper()}": str(value) for name, value in settings.items()})
    return environment
