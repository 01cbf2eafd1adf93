"""Loading the C++ kernels: the library for this CPU."""

from __future__ import annotations

import ctypes
import logging
import os
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from nanovllm.errors import ParameterError
from nanovllm.ops.cpu.build import LIBRARIES, X86_INSTRUCTION_SETS, library_file

logger = logging.getLogger("nanovllm")

VARIABLE = "NANOVLLM_CPU_ISA"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype in csrc/kernels.h

_REQUIRED_CPU_FLAGS = {  # names in /proc/cpuinfo
    "avx512_bf16": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"},
    "avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "avx2": {"avx2", "fma", "f16c", "bmi1", "bmi2"},
    "generic": set(),
}


class AttentionArguments(ctypes.Structure):
    """struct AttentionArguments of csrc/kernels.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "out", "k_cache", "v_cache", "query_start", "seq_lens", "block_table")),
        *((name, c_int64) for name in ("q_stride", "block_stride", "token_stride", "head_stride", "table_stride")),
        *((name, c_int32) for name in ("rows", "block_size", "heads", "kv_heads", "head_dim", "window")),
        ("scale", c_float),
        ("dtype", c_int32),
    )


class QkvArguments(ctypes.Structure):
    """struct QkvArguments of csrc/kernels.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("qkv", "q_weight", "k_weight", "cosine", "sine", "slots")),
        *((name, c_void_p) for name in ("q_out", "k_cache", "v_cache")),
        *((name, c_int64) for name in ("tokens", "block_size", "block_stride", "token_stride", "head_stride")),
        *((name, c_int32) for name in ("heads", "kv_heads", "head_dim")),
        ("eps", c_float),
        ("dtype", c_int32),
    )


class LinearArguments(ctypes.Structure):
    """struct LinearArguments of csrc/kernels.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "packed", "bias", "out")),
        *((name, c_int64) for name in ("rows", "inputs", "outputs", "x_stride")),
        ("dtype", c_int32),
    )


class QuantizedWeight(ctypes.Structure):
    """struct QuantizedWeight of csrc/kernels.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("packed", "scales")),
        *((name, c_int64) for name in ("outputs", "inputs", "group")),
        ("bits", c_int32),
    )


class QuantizedArguments(ctypes.Structure):
    """struct QuantizedArguments of csrc/kernels.h."""

    _fields_ = (
        ("weight", QuantizedWeight),
        *((name, c_void_p) for name in ("x", "bias", "out")),
        ("rows", c_int64),
        *((name, c_int32) for name in ("digits", "dtype")),
    )


_P, _N, _I, _F = c_void_p, c_int64, c_int32, c_float
_FUNCTIONS: dict[str, tuple[type, ...]] = {  # arguments; nothing is returned
    "set_threads": (_I,),
    "paged_attention": (ctypes.POINTER(AttentionArguments),),
    "rms_norm": (_P, _P, _P, _N, _N, _N, _N, _N, _F, _I),
    "add_rms_norm": (_P, _P, _P, _P, _P, _N, _N, _F, _I),
    "rotary": (_P, _P, _P, _P, _N, _N, _N, _N, _I),
    "norm_rotate_write": (ctypes.POINTER(QkvArguments),),
    "write_kv": (_P, _P, _P, _P, _P, _N, _N, _N, _N, _N, _N, _N, _N, _N, _N),
    "silu_and_mul": (_P, _P, _N, _N, _I),
    "pack_linear": (_P, _N, _N, _N, _P, _I),
    "linear": (ctypes.POINTER(LinearArguments),),
    "unpack_rows": (ctypes.POINTER(LinearArguments), _P, _N, _P),
    "dequantize_rows": (ctypes.POINTER(QuantizedArguments), _P, _N, _P),
    "quantize": (ctypes.POINTER(QuantizedWeight), _P, _N, _I),
    "quantized_linear": (ctypes.POINTER(QuantizedArguments),),
}
_SIZES: dict[str, tuple[type, ...]] = {  # arguments; a size is returned
    "packed_bytes": (_N, _N, _I),
    "quantized_bytes": (_N, _N, _I),
    "scale_count": (_N, _N, _N),
}


class Library:
    """The kernels compiled for one instruction set; every function of csrc/kernels.h is an attribute."""

    def __init__(self, file: Path, instruction_set: str) -> None:
        library = ctypes.CDLL(str(file))
        self.instruction_set = instruction_set
        for functions, returned in ((_FUNCTIONS, None), (_SIZES, c_int64)):
            for name, argument_types in functions.items():
                function = getattr(library, f"nanovllm_{name}")
                function.argtypes, function.restype = argument_types, returned
                setattr(self, name, function)
        self.set_threads(torch.get_num_threads())


def supported_instruction_sets() -> list[str]:
    """The instruction sets this CPU has and a library is built for, best first."""
    flags = _cpu_flags()
    return [
        name
        for name in X86_INSTRUCTION_SETS
        if flags >= _REQUIRED_CPU_FLAGS[name] and (LIBRARIES / library_file(name)).is_file()
    ]


@cache
def load_library(instruction_set: str | None = None) -> Library | None:
    """The kernels for ``instruction_set``, by default ``$NANOVLLM_CPU_ISA`` or the best the CPU has.

    None if no library is built, or it does not fit these sources. Raises ParameterError for an instruction set the CPU
    or the build lacks.
    """
    supported = supported_instruction_sets()
    wanted = instruction_set or os.environ.get(VARIABLE) or (supported[0] if supported else None)
    if wanted is None:
        return None
    if wanted not in supported:
        raise ParameterError(f"this machine has kernels for: {', '.join(supported) or 'none'}", VARIABLE, wanted)
    try:
        return Library(LIBRARIES / library_file(wanted), wanted)
    except (OSError, AttributeError) as error:  # built from other sources, or for another machine
        logger.warning("The C++ kernels cannot be used (%s); build them again.", error)
        return None


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())
