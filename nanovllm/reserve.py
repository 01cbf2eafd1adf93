"""Memory for weights, made ready while torch is imported.

Memory costs most when it is written for the first time: the system has to find pages and clear them. For a gigabyte
that takes a third of a second, and several times as long in some virtual machines. Importing torch takes a second of
one core. So another thread touches meanwhile what the weights will be read into. Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from nanovllm.errors import ModelError
from nanovllm.model_files import checkpoint_files, read_tensor_header

HUGE_PAGE = 2 << 20
_LEAST = 16 * HUGE_PAGE  # less is quickly found
_KERNELS = Path(__file__).parent / "ops" / "cpu" / "lib" / "kernels_generic.so"  # any machine can load these

_reserve: Reserve | None = None


class Reserve:
    """Memory that a thread of its own is touching.

    Attributes:
        memory: at least as many bytes as asked for, in large pages where the system has them.
    """

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._wanted = ctypes.c_int32(1)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        Thread(target=self._touch, args=(size,), name="weights-memory", daemon=True).start()

    def _touch(self, size: int) -> None:
        try:
            touch = ctypes.CDLL(str(_KERNELS)).nanovllm_touch
        except (OSError, AttributeError):  # built from other sources
            return
        touch.argtypes, touch.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p), None
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        first = -(-address // HUGE_PAGE) * HUGE_PAGE
        touch(first, size, mmap.PAGESIZE, ctypes.addressof(self._wanted))

    def give_up(self) -> None:
        """Nobody wants the memory any more."""
        self._wanted.value = 0


@contextmanager
def memory_for_weights(folder: Path, dtype: str, tied: bool) -> Iterator[None]:
    """Within this context, memory for the matrices of a checkpoint that are stored in ``dtype`` ("bfloat16", "float32")
    can be taken with ``take_reserve``; what nobody has taken at the end is given back. A checkpoint that cannot be read
    has none: whoever loads it says why. There is none either but on Linux with kernels that will take it."""
    global _reserve
    size = 0
    if hasattr(mmap, "MADV_HUGEPAGE") and _KERNELS.is_file():
        size = matrix_bytes(folder, {"bfloat16": "BF16", "float32": "F32"}.get(dtype, ""), tied)
    mine = _reserve = Reserve(size) if size > _LEAST else None
    try:
        yield
    finally:
        if mine is not None:
            mine.give_up()
        _reserve = None


def take_reserve() -> mmap.mmap | None:
    """The memory that is being made ready, if there is any: for the first who asks."""
    global _reserve
    taken, _reserve = _reserve, None
    return None if taken is None else taken.memory


def matrix_bytes(folder: Path, stored: str, tied: bool) -> int:
    """Bytes of a checkpoint's matrices of the dtype called ``stored``; ``tied``: without a separate output head."""
    try:
        return sum(
            tensor.end - tensor.start
            for file in checkpoint_files(folder)
            for name, tensor in read_tensor_header(file).items()
            if len(tensor.shape) == 2 and tensor.dtype == stored and not (tied and name.endswith("lm_head.weight"))
        )
    except (ModelError, OSError):
        return 0
