"""Checks of NVIDIA GPUs: driver, torch's build, and whether the one can run the other."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanovllm.entrypoints.doctor import probes
from nanovllm.entrypoints.doctor.ascend_versions import numbers
from nanovllm.entrypoints.doctor.findings import Finding, ok, problem, warning

ROOT = Path("/")  # tests look elsewhere


def check_gpu(wanted: bool, torch: dict[str, Any] | None) -> Iterator[Finding]:
    """Everything about NVIDIA.

    Args:
        wanted: the engine is to run on a GPU, so that there being none is a problem.
        torch: what torch says of itself (``probes.TORCH``), None if it cannot.
    """
    answer = probes.ask(probes.GPU)
    if answer.value is None:
        yield problem(
            "NVIDIA", f"asking the driver failed: {answer.failure}", "install the driver again; see nvidia-smi"
        )
        return
    kernel_module = ROOT / "proc/driver/nvidia/version"
    if not answer.value["GPUs"]:
        yield _no_gpu(wanted, kernel_module.is_file())
        return
    names = ", ".join(name for name, _ in answer.value["GPUs"])
    driver = answer.value["driver's CUDA"]
    newest = ".".join(map(str, driver)) if driver else "unknown"
    yield ok("NVIDIA", f"{names}; the driver runs CUDA up to {newest}")
    yield from _check_torch(answer.value, driver, torch)
    old = [name for name, capability in answer.value["GPUs"] if tuple(capability) < (8, 0)]
    if old:
        what = f"{old[0]} is older than Ampere: torch's operators in float16, without our kernels"
        yield warning("GPU kernels", what, "use a GPU of compute capability 8.0 or newer")
    elif importlib.util.find_spec("triton") is None:
        yield warning("GPU kernels", "Triton is not installed: slow", "pip install triton")


def _no_gpu(wanted: bool, kernel_module: bool) -> Finding:
    if kernel_module:
        remedy = "nvidia-smi says more; in Docker: --gpus all; CUDA_VISIBLE_DEVICES must not hide it"
        return problem("NVIDIA", "the kernel's driver is loaded, but no GPU is visible to this process", remedy)
    if wanted:
        return problem("NVIDIA", "no GPU and no driver", "install NVIDIA's driver; in Docker: --gpus all")
    return ok("NVIDIA", "no NVIDIA GPU here")


def _check_torch(gpu: dict[str, Any], driver: list[int] | None, torch: dict[str, Any] | None) -> Iterator[Finding]:
    if not gpu["torch has CUDA"]:
        remedy = "pip install torch --index-url https://download.pytorch.org/whl/cu130 (or your driver's CUDA)"
        yield warning("torch and CUDA", "the installed torch is for CPUs: the GPU is not used", remedy)
        return
    if torch is None or torch["CUDA build"] is None:
        return
    build = str(torch["CUDA build"])
    if driver is not None and numbers(build)[:1] > (driver[0],):
        yield problem(
            "torch and CUDA",
            f"torch is built for CUDA {build}, the driver runs up to {driver[0]}.{driver[1]}",
            f"install a newer driver, or a torch for CUDA {driver[0]} from pytorch.org",
        )
    elif not torch["CUDA devices"]:
        remedy = "python -c 'import torch; torch.zeros(1, device=\"cuda\")' says why; nvidia-smi shows other faults"
        yield problem("torch and CUDA", f"torch for CUDA {build} sees no GPU", remedy)
    else:
        yield ok("torch and CUDA", f"built for CUDA {build}: {', '.join(torch['CUDA devices'])}")
