"""Checks of the machine itself: Python, torch, the C++ kernels, memory, threads."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata

from nanovllm.entrypoints.doctor import probes
from nanovllm.entrypoints.doctor.ascend_versions import OLDEST_TORCH, numbers
from nanovllm.entrypoints.doctor.findings import Finding, ok, problem, warning

_LITTLE_MEMORY = 2 * 2**30  # bytes: the weights of a model of half a billion parameters, and some cache


def check_python() -> Iterator[Finding]:
    """The interpreter."""
    yield ok("Python", f"{platform.python_version()} ({sys.executable})")


def check_torch(torch: probes.Answer) -> Iterator[Finding]:
    """Whether torch can be imported as the environment says, and is new enough; ``torch`` answered without plug-ins."""
    oldest = ".".join(map(str, OLDEST_TORCH))
    install = f"pip install 'torch>={oldest}'"
    if torch.value is None:
        missing = "No module named 'torch'" in torch.failure
        yield problem("torch", "not installed" if missing else f"cannot be imported: {torch.failure}", install)
        return
    version = str(torch.value["version"])
    if numbers(version)[:2] < OLDEST_TORCH:
        yield problem("torch", f"{version} is older than {oldest}", install)
    else:
        yield ok("torch", version)
    plug_ins = sorted({entry.name for entry in metadata.entry_points(group="torch.backends")})
    if plug_ins and os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0":
        with_plug_ins = probes.ask("import torch; print('{}')", autoload=True)
        if with_plug_ins.value is None:
            libraries = probes.missing_libraries(with_plug_ins.log)
            reason = f"{libraries[0]}: not found" if libraries else with_plug_ins.failure
            yield warning(
                "import torch",
                f"fails, since it loads an installed plug-in ({', '.join(plug_ins)}) that is broken: {reason}",
                "nanovllm loads torch without; for other programs export TORCH_DEVICE_BACKEND_AUTOLOAD=0 until the "
                "plug-in is repaired or uninstalled",
            )


def check_kernels() -> Iterator[Finding]:
    """The C++ kernels of the CPU, and the threads they run on."""
    answer = probes.ask(probes.KERNELS)
    if answer.value is None:
        yield warning("CPU kernels", answer.failure, "repair torch first; then this command again")
        return
    name = answer.value["instruction set"]
    if name is None:
        remedy = "install g++, then python -m nanovllm.ops.cpu.build"
        yield warning("CPU kernels", "not built: the CPU runs on torch's operators, several times slower", remedy)
    else:
        yield ok("CPU kernels", f"built for {name}")
    yield from check_threads(answer.value["threads"], answer.value["cores"], os.environ.get("OMP_NUM_THREADS"))


def check_threads(threads: int, cores: int, asked: str | None) -> Iterator[Finding]:
    """Threads that torch uses, on the physical cores this process may use; ``asked``: ``OMP_NUM_THREADS``."""
    what = f"{threads} on {cores} physical core(s)" + (f", because OMP_NUM_THREADS is {asked}" if asked else "")
    if threads > cores:
        yield warning("threads", f"{what}: they wait for each other", f"unset OMP_NUM_THREADS, or set it to {cores}")
    elif threads < cores and asked is not None:
        yield warning("threads", f"{what}: cores stay idle when the CPU computes", "unset OMP_NUM_THREADS")
    else:
        yield ok("threads", what)


def check_memory() -> Iterator[Finding]:
    """Memory this process can still take, whatever limits it."""
    from nanovllm.platforms import CpuPlatform

    free = CpuPlatform().available_memory()
    what = f"{free / 2**30:.1f} GiB available to this process"
    if free < _LITTLE_MEMORY:
        yield warning("memory", what, "end other programs, raise the container's limit, or choose a small model")
    else:
        yield ok("memory", what)
