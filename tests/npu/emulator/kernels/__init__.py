"""The emulated operator library. Imported inside a process on the emulated Ascend, when the device is initialised.

Kernels are written from the operators' public documentation, and apart from the engine's own references: a kernel that
shared code with what it tests would only repeat its mistakes.
"""

from . import (  # noqa: F401  (importing registers)
    atb,
    attention,
    copying,
    elementwise,
    indexing,
    kv_cache,
    matmul,
    mixture,
    normalization,
    random,
    reductions,
    rotary,
    sampling,
)
from .registry import install

install()
