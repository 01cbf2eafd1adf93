"""What the NVIDIA driver says of the machine's GPUs, asked through its own library: no torch, no context, no memory.

So a process that never computes anything (the server's front, the command line) can choose a device without loading
torch. Devices are numbered as in torch: after ``CUDA_VISIBLE_DEVICES``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _MULTIPROCESSORS = 75, 76, 16  # CUdevice_attribute


@dataclass(frozen=True)
class Gpu:
    """One visible GPU.

    Attributes:
        capability: (major, minor), (9, 0) for Hopper.
        total_memory: bytes.
        multiprocessors: number of SMs.
    """

    name: str
    capability: tuple[int, int]
    total_memory: int
    multiprocessors: int


@lru_cache(maxsize=1)
def visible_gpus() -> tuple[Gpu, ...]:
    """The GPUs this process may use; empty without a driver, without a GPU, or where all are hidden."""
    library = _load_driver()
    if library is None or library.cuInit(0) != 0:
        return ()
    count = ctypes.c_int()
    if library.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_describe(library, number) for number in range(count.value))


def driver_cuda_version() -> tuple[int, int] | None:
    """The newest CUDA the driver can run, such as (13, 0); None without a driver."""
    library = _load_driver()
    version = ctypes.c_int()
    if library is None or library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def torch_is_built_for_cuda() -> bool:
    """Whether the installed torch has CUDA, from its files: torch is not imported."""
    if "torch" in sys.modules:
        return sys.modules["torch"].version.cuda is not None
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    folder = Path(spec.origin).parent / "lib"
    return any((folder / name).exists() for name in ("libtorch_cuda.so", "torch_cuda.dll"))


def _load_driver() -> ctypes.CDLL | None:
    for name in ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _describe(library: ctypes.CDLL, number: int) -> Gpu:
    device, total = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    library.cuDeviceGet(ctypes.byref(device), number)
    library.cuDeviceGetName(name, len(name), device)
    library.cuDeviceTotalMem_v2(ctypes.byref(total), device)

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        library.cuDeviceGetAttribute(ctypes.byref(value), which, device)
        return value.value

    capability = attribute(_CAPABILITY_MAJOR), attribute(_CAPABILITY_MINOR)
    return Gpu(name.value.decode(errors="replace"), capability, total.value, attribute(_MULTIPROCESSORS))
