"""Loading the C++ kernels: the library for this CPU."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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


_P, _N, _I, _F = c_void_p, c_int64, c_int32, c_float


class Batch(ctypes.Structure):
    """struct Batch of csrc/kernels.h."""

    _fields_ = (
        *((name, _P) for name in ("query_start", "seq_lens", "block_table")),
        *((name, _N) for name in ("table_stride", "requests")),
    )


class Arguments(ctypes.Structure):
    """What a kernel takes. The first field is the number of rows; no other depends on it."""

    _fields_: ClassVar[Any] = (("rows", _N),)


class AttentionArguments(Arguments):
    """struct AttentionArguments of csrc/kernels.h."""

    _fields_ = (
        *((name, _P) for name in ("q", "out", "k_cache", "v_cache", "batch")),
        *((name, _N) for name in ("q_stride", "block_stride", "token_stride", "head_stride")),
        *((name, _I) for name in ("block_size", "heads", "kv_heads", "head_dim", "window")),
        ("scale", _F),
        ("dtype", _I),
    )


class QkvArguments(Arguments):
    """struct QkvArguments of csrc/kernels.h."""

    _fields_ = (
        *((name, _P) for name in ("qkv", "q_weight", "k_weight", "cosine", "sine", "slots")),
        *((name, _P) for name in ("q_out", "k_cache", "v_cache")),
        *((name, _N) for name in ("block_size", "block_stride", "token_stride", "head_stride")),
        *((name, _I) for name in ("heads", "kv_heads", "head_dim")),
        ("eps", _F),
        ("dtype", _I),
    )


class NormArguments(Arguments):
    """struct NormArguments of csrc/kernels.h."""

    _fields_ = (
        *((name, _P) for name in ("x", "residual", "weight", "out", "sum")),
        ("n", _N),
        ("eps", _F),
        ("dtype", _I),
    )


class GateArguments(Arguments):
    """struct GateArguments of csrc/kernels.h."""

    _fields_ = (("x", _P), ("out", _P), ("n", _N), ("dtype", _I))


class LinearArguments(Arguments):
    """struct LinearArguments of csrc/kernels.h."""

    _fields_ = (
        *((name, _P) for name in ("x", "packed", "bias", "out")),
        *((name, _N) for name in ("inputs", "outputs")),
        ("dtype", _I),
    )


class QuantizedWeight(ctypes.Structure):
    """struct QuantizedWeight of csrc/kernels.h."""

    _fields_ = (
        *((name, _P) for name in ("packed", "scales")),
        *((name, _N) for name in ("outputs", "inputs", "group")),
        ("bits", _I),
    )


class QuantizedArguments(Arguments):
    """struct QuantizedArguments of csrc/kernels.h."""

    _fields_ = (
        *((name, _P) for name in ("x", "bias", "out")),
        ("weight", QuantizedWeight),
        *((name, _I) for name in ("digits", "dtype")),
    )


class GatherArguments(Arguments):
    """struct GatherArguments of csrc/kernels.h."""

    _fields_ = (*((name, _P) for name in ("indices", "source", "out")), ("row_bytes", _N))


class ChooseArguments(Arguments):
    """struct ChooseArguments of csrc/kernels.h."""

    _fields_ = (
        *((name, _P) for name in ("logits", "temperature", "top_k", "top_p", "min_p", "seeds", "positions", "tokens")),
        ("columns", _N),
    )


class PenaltyArguments(Arguments):
    """struct PenaltyArguments of csrc/kernels.h."""

    _fields_ = (
        *((name, _P) for name in ("logits", "tokens", "logit_rows", "table_rows", "lengths", "num_prompt")),
        *((name, _P) for name in ("repetition", "frequency", "presence")),
        *((name, _N) for name in ("columns", "token_stride")),
    )


class Call(ctypes.Structure):
    """struct Call of csrc/kernels.h."""

    _fields_ = (("kernel", _P), ("arguments", _P))


Kernel = Callable[[Any], None]

_KERNELS: dict[str, type[Arguments]] = {
    "paged_attention": AttentionArguments,
    "norm_rotate_write": QkvArguments,
    "norm": NormArguments,
    "silu_and_mul": GateArguments,
    "linear": LinearArguments,
    "quantized_linear": QuantizedArguments,
    "unpack_rows": LinearArguments,
    "dequantize_rows": QuantizedArguments,
    "gather_rows": GatherArguments,
    "choose": ChooseArguments,
    "penalise": PenaltyArguments,
}
_FUNCTIONS: dict[str, tuple[type, ...]] = {  # arguments; nothing is returned
    "run": (ctypes.POINTER(Call), _N, _N),
    "set_threads": (_I,),
    "pack_linear": (_P, _N, _N, _N, _P, _I),
    "quantize": (ctypes.POINTER(QuantizedWeight), _P, _N, _I),
}
_SIZES: dict[str, tuple[type, ...]] = {  # arguments; a size is returned
    "packed_bytes": (_N, _N, _I),
    "quantized_bytes": (_N, _N, _I),
    "scale_count": (_N, _N, _N),
}


class Library:
    """The kernels compiled for one instruction set; every function of csrc/kernels.h is an attribute.

    One for each operator table, so that one can record a program while another runs.

    Attributes:
        recording: where calls of kernels go instead of being carried out, while a program is recorded.
    """

    def __init__(self, file: Path, instruction_set: str) -> None:
        library = ctypes.CDLL(str(file))
        self.instruction_set = instruction_set
        self.recording: list[tuple[Kernel, Arguments]] | None = None
        for kernel, arguments in _KERNELS.items():
            self._declare(library, kernel, (ctypes.POINTER(arguments),), None)
        for functions, returned in ((_FUNCTIONS, None), (_SIZES, _N)):
            for name, argument_types in functions.items():
                self._declare(library, name, argument_types, returned)

    def _declare(self, library: ctypes.CDLL, name: str, arguments: tuple[Any, ...], returned: type | None) -> None:
        function = getattr(library, f"nanovllm_{name}")
        function.argtypes, function.restype = arguments, returned
        setattr(self, name, function)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def call(self, kernel: Kernel, arguments: Arguments) -> None:
        """Run a kernel, or record the call: its arguments as they are now."""
        if self.recording is None:
            kernel(arguments)
        else:
            self.recording.append((kernel, type(arguments).from_buffer_copy(arguments)))


def supported_instruction_sets() -> list[str]:
    """The instruction sets this CPU has and a library is built for, best first."""
    flags = _cpu_flags()
    return [
        name
        for name in X86_INSTRUCTION_SETS
        if flags >= _REQUIRED_CPU_FLAGS[name] and (LIBRARIES / library_file(name)).is_file()
    ]


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
