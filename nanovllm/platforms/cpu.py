"""The CPU: its memory, its number formats, its threads."""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from nanovllm.errors import ParameterError

_CGROUP = Path("/sys/fs/cgroup")
_KERNELS = Path(__file__).resolve().parents[1] / "ops" / "cpu" / "lib"
_VECTORS = {"avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}, "avx2": {"avx2", "fma"}}
_LOGITS_FOR_SEVERAL_THREADS = 1 << 20


class CpuPlatform:
    """A CPU with the memory of its machine or container.

    Attributes:
        device: the device name torch and the operator table know.
        overlap: whether planning the next step while one runs pays. On a CPU both would fight for the same cores.
        memory_utilization: share of the free memory that weights and cache take by default. A CPU's memory belongs to
            other programs too, and the prefix cache fills whatever the KV cache is given.
        block_size: tokens in a block of the KV cache, by default.
        step_tokens: most tokens in a step, by default. More would bring no speed, for products are at their limit from
            some 64 tokens on; but each takes memory (30 KB in a model of 0.6 billion parameters), and all who decode
            wait for the step.
    """

    device = "cpu"
    overlap = False
    memory_utilization = 0.5
    block_size = 16
    step_tokens = 1024

    def __init__(self) -> None:
        # An OpenMP thread that has nothing to do spins, by default for milliseconds. That is no use between two steps,
        # and on a machine with other work it takes the core from the thread that has some: a decode of a small model
        # was twice as slow. libgomp reads this when torch loads it.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "2000")

    def load(self) -> None:
        """Torch knows the CPU."""

    def resolve_dtype(self, dtype: str, checkpoint_dtype: str | None) -> str:
        """The dtype to compute in, for what the user asked and what the checkpoint holds (None: it does not say).

        Anything asked for by name is honoured (float16 too, though few CPUs are fast at it). "auto" is the checkpoint's
        own dtype, except that 16-bit checkpoints run in bfloat16 where the CPU multiplies it natively, or our kernels
        are built for its AVX-512 or AVX2: half the bytes make decoding 1.5 to 3 times as fast as float32, at the price
        of prompts that are up to a quarter slower. Elsewhere they run in float32: torch emulates bfloat16 slowly.
        """
        if dtype != "auto":
            return dtype
        if checkpoint_dtype in ("bfloat16", "float16"):
            return "bfloat16" if has_native_bfloat16() or _has_vector_kernels() else "float32"
        return "float32"

    def check_cache_dtype(self, name: str) -> None:
        """Raises ParameterError unless the KV cache is in the model's dtype ("auto")."""
        if name != "auto":
            raise ParameterError("on a CPU, keys and values have the model's dtype; use 'auto'", "kv_cache_dtype", name)

    def check_quantization(self, name: str | None) -> None:
        """Raises ParameterError for weights that the device does not multiply. Here the operators say so."""

    def check_block_size(self, block_size: int) -> None:
        """Any will do."""

    def available_memory(self) -> int:
        """Bytes this process can still take: the machine's free memory, or the container's if that is less."""
        free = _meminfo("MemAvailable")
        if free is None:  # no /proc: not Linux
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        limits = [left for group in _cgroup_folders() if (left := _cgroup_memory_left(group)) is not None]
        return max(0, min([free, *limits]))

    def memory_budget(self, utilization: float) -> int:
        """Bytes this process may take beyond what it holds now: a share of the free memory."""
        return int(self.available_memory() * utilization)

    def peak_memory(self, work: Callable[[], object]) -> int | None:
        """None: trying a step costs more than the rest of the start-up, and shapes bound what it takes."""
        return None

    def memory_used_by_process(self) -> int:
        """Bytes of memory resident in this process."""
        try:
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024

    def set_threads(self) -> int:
        """Let torch use every physical core this process may run on; returns the number of threads.

        OMP_NUM_THREADS, where set, has the last word.
        """
        import torch

        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(usable_cores())
        return torch.get_num_threads()

    @contextmanager
    def sampling(self, num_logits: int) -> Iterator[None]:
        """Work on ``num_logits`` logits with as many of torch's threads as that is worth.

        Torch divides anything of 32k elements, and waits for its threads; where another process has their core for a
        moment, that is milliseconds each time. A few rows of logits are done sooner by one thread.
        """
        import torch

        threads = torch.get_num_threads()
        try:
            if num_logits < _LOGITS_FOR_SEVERAL_THREADS:
                torch.set_num_threads(1)
            yield
        finally:
            torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def has_native_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products (AVX512-BF16, AMX, or the BF16 extension of Arm)."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return platform.machine() == "arm64" and _apple_bfloat16()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def _has_vector_kernels() -> bool:
    """Whether the C++ kernels are built for an instruction set with wide vectors, and this CPU has it."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return any(flags <= words and (_KERNELS / f"kernels_{name}.so").is_file() for name, flags in _VECTORS.items())


def _apple_bfloat16() -> bool:
    import subprocess

    query = ["sysctl", "-n", "hw.optional.arm.FEAT_BF16"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() == "1"


def _meminfo(key: str) -> int | None:
    """A value of /proc/meminfo in bytes."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _cgroup_folders() -> list[Path]:
    """The folders in which control groups (v1 and v2) may limit this process, its own and those above it."""
    folders = [_CGROUP, _CGROUP / "memory"]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers in ("", "memory"):
            root = _CGROUP / controllers
            below = root / name.lstrip("/")
            folders += [below, *(p for p in below.parents if root in p.parents)]
    return folders


def _cgroup_memory_left(folder: Path) -> int | None:
    """Bytes a control group leaves to its members; None if it sets no limit. Page cache can be reclaimed: not counted
    as used."""
    for limit, usage, caches in (
        ("memory.max", "memory.current", ("active_file", "inactive_file")),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
    ):
        try:
            most = int((folder / limit).read_text())  # "max" is a ValueError: no limit
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        return most - used + sum(int(stat.get(name, 0)) for name in caches)
    return None


def usable_cores() -> int:
    """Physical cores in this process's affinity mask, at most the container's CPU quota."""
    if not hasattr(os, "sched_getaffinity"):
        return max(1, (os.cpu_count() or 1))
    cpus = os.sched_getaffinity(0)
    cores = set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    quotas = [quota for group in _cgroup_folders() if (quota := _cgroup_cpus(group)) is not None]
    return max(1, min([len(cores), *quotas]))


def _cgroup_cpus(folder: Path) -> int | None:
    """CPUs a control group (v2) grants, rounded up; None without a limit."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        return None
