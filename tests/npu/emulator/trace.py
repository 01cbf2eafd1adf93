"""What this process submits to the emulated device and waits for, in order: to count launches and find hidden waits."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator


@contextlib.contextmanager
def traced() -> Iterator[list[str]]:
    """A list that holds, once the block is left, the names of all tasks submitted in it.

    Operators have their name in the library (``aclnnMatmul``); beside them there are ``memcpy``, ``memset``, ``graph
    launch``, and the waits of the host: ``wait for stream``, ``wait for event``, ``wait for device``.
    """
    library = ctypes.CDLL("libascendcl.so")
    found: list[str] = []
    library.emulated_trace(1)
    try:
        yield found
    finally:
        library.emulated_trace(0)
        names = ctypes.POINTER(ctypes.c_char_p)()
        count = library.emulated_traced(ctypes.byref(names))
        found.extend(names[i].decode() for i in range(count))
