"""From what torch_npu passes to an operator to Python values: tensors become views of the same memory.

An operator's Python function states its C signature in its annotations, so decoding needs no guessing. What does not
fit (another kind of object, a freed one, a wrong number of arguments, an address outside device memory) is an error.
"""

from __future__ import annotations

import ctypes
import inspect
import itertools
import os
import struct
from collections.abc import Callable
from typing import Any

import torch

_MAX_DIMS = 16
_TENSOR, _SCALAR, _INTS, _FLOATS, _BOOLS, _TENSORS, _SCALARS = range(0x7E450001, 0x7E450008)
ND_FORMATS = (-1, 0, 2, 27, 30, 35, 47)  # plain row-major layouts, by whatever name
FRACTAL_NZ = 29

DTYPES = {
    0: torch.float32, 1: torch.float16, 2: torch.int8, 3: torch.int32, 4: torch.uint8, 6: torch.int16,
    7: torch.uint16, 8: torch.uint32, 9: torch.int64, 10: torch.uint64, 11: torch.float64, 12: torch.bool,
    16: torch.complex64, 17: torch.complex128, 27: torch.bfloat16,
}  # fmt: skip

# Names for annotations of the operators' C types.
Tensor = torch.Tensor
Scalar = Any
Ints = Floats = Bools = Tensors = list
int8 = int32 = uint64 = int
float32 = float
dtype = Any


class ArgumentError(Exception):
    """The call does not fit the operator's signature."""


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("object", ctypes.c_uint32), ("dtype", ctypes.c_int32), ("format", ctypes.c_int32), ("dims", ctypes.c_uint32),
        ("sizes", ctypes.c_int64 * _MAX_DIMS), ("strides", ctypes.c_int64 * _MAX_DIMS), ("offset", ctypes.c_int64),
        ("storage_dims", ctypes.c_uint32), ("storage_sizes", ctypes.c_int64 * _MAX_DIMS), ("data", ctypes.c_void_p),
    ]  # fmt: skip


class _Scalar(ctypes.Structure):
    _fields_ = [("object", ctypes.c_uint32), ("dtype", ctypes.c_int32), ("bytes", ctypes.c_char * 16)]


class _Array(ctypes.Structure):
    _fields_ = [("object", ctypes.c_uint32), ("unused", ctypes.c_uint32), ("count", ctypes.c_uint64)]


def view_of_memory(address: int, size: int) -> torch.Tensor:
    """``size`` bytes at ``address`` as a CPU tensor of bytes that shares them."""
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.uint8)


def set_view_shape(tensor: torch.Tensor, sizes: Any) -> None:
    """Operators with outputs of unknown size tell it through the output's descriptor, after running."""
    record = _Tensor.from_address(tensor.descriptor)
    record.dims = len(sizes)
    for i, size in enumerate(sizes):
        record.sizes[i] = size


def _expect(address: int, kind: int, what: str) -> None:
    if ctypes.c_uint32.from_address(address).value != kind:
        raise ArgumentError(f"{what} expected, found another kind of object (or one that was destroyed)")


def _tensor(address: int) -> torch.Tensor:
    _expect(address, _TENSOR, "a tensor")
    record = _Tensor.from_address(address)
    if record.dtype not in DTYPES:
        raise ArgumentError(f"dtype {record.dtype} is not emulated")
    kind = DTYPES[record.dtype]
    sizes, strides = list(record.sizes[: record.dims]), list(record.strides[: record.dims])
    nz = record.format == FRACTAL_NZ
    if record.format not in ND_FORMATS and not nz:
        raise ArgumentError(f"format {record.format} is not emulated")
    if nz:
        logical, sizes = sizes, list(record.storage_sizes[: record.storage_dims])
        strides = [1] * len(sizes)
        for i in range(len(sizes) - 2, -1, -1):
            strides[i] = strides[i + 1] * sizes[i + 1]
    if 0 in sizes:
        return torch.empty(sizes, dtype=kind, device="cpu")
    item = kind.itemsize
    size = item * (1 + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True)))
    start = (record.data or 0) + item * record.offset
    if not _library.emulated_is_device_memory(ctypes.c_void_p(start), ctypes.c_size_t(size)):
        raise ArgumentError(f"a tensor of {sizes} {kind} at {start:#x} reaches outside device memory")
    view = view_of_memory(start, size).view(kind).as_strided(sizes, strides)
    view.descriptor = address
    if nz:
        view.nz_of = logical  # tiled storage; kernels that read it say so
    return view


def _scalar(address: int) -> Any:
    _expect(address, _SCALAR, "a scalar")
    record = _Scalar.from_address(address)
    raw = ctypes.string_at(address + 8, 16)
    kind = DTYPES[record.dtype]
    if kind is torch.bfloat16:
        return struct.unpack("<f", b"\0\0" + raw[:2])[0]
    formats = {
        torch.float32: "<f", torch.float16: "<e", torch.float64: "<d", torch.int8: "<b", torch.uint8: "<B",
        torch.int16: "<h", torch.int32: "<i", torch.int64: "<q", torch.bool: "<?",
    }  # fmt: skip
    return struct.unpack_from(formats[kind], raw)[0]


def _array(kind: int, what: str, item: Any) -> Callable[[int], list]:
    def decode(address: int) -> list:
        _expect(address, kind, what)
        count = _Array.from_address(address).count
        return list((item * count).from_address(address + ctypes.sizeof(_Array)))

    return decode


def _tensors(address: int) -> list[torch.Tensor]:
    return [_tensor(item) for item in _array(_TENSORS, "a list of tensors", ctypes.c_uint64)(address)]


def _signed(bits: int) -> Callable[[int], int]:
    return lambda value: (value & (2**bits - 1)) - ((value >> (bits - 1) & 1) << bits)


def _dtype(value: int) -> torch.dtype | None:
    code = _signed(32)(value)
    if code == -1:
        return None
    return DTYPES[code]


# How each C type is read. Pointers: from the object; numbers: from the register or the stack slot.
_POINTERS: dict[str, Callable[[int], Any]] = {
    "Tensor": _tensor,
    "Scalar": _scalar,
    "Ints": _array(_INTS, "an array of integers", ctypes.c_int64),
    "Floats": _array(_FLOATS, "an array of floats", ctypes.c_float),
    "Bools": _array(_BOOLS, "an array of booleans", ctypes.c_bool),
    "Tensors": _tensors,
    "str": lambda address: ctypes.string_at(address).decode(),
}
_INTEGERS: dict[str, Callable[[int], Any]] = {
    "int": _signed(64),
    "int32": _signed(32),
    "int8": _signed(8),
    "uint64": lambda value: value,
    "bool": lambda value: bool(value & 0xFF),
    "dtype": _dtype,
}
_FLOATS_IN_REGISTERS: dict[str, str] = {"float": "<d", "float32": "<f"}

Decoder = Callable[[Any, Any, Any], tuple[list[Any], int, int]]


def signature_decoder(function: Callable) -> Decoder:
    """A function from (integer registers, float registers, stack) to (arguments, workspace and executor pointers)."""
    parameters = [(p.name, str(p.annotation)) for p in inspect.signature(function).parameters.values()]
    known = {*_POINTERS, *_INTEGERS, *_FLOATS_IN_REGISTERS}
    for name, annotation in parameters:
        if annotation.removesuffix(" | None") not in known:
            raise TypeError(f"{function.__name__}({name}: {annotation}): unknown C type")

    def decode(integers: Any, floats: Any, stack: Any) -> tuple[list[Any], int, int]:
        next_integer = next_float = next_slot = 0

        def integer() -> int:
            nonlocal next_integer, next_slot
            if next_integer < 6:
                next_integer += 1
                return integers[next_integer - 1]
            next_slot += 1
            return stack[next_slot - 1]

        def floating(layout: str) -> float:
            nonlocal next_float, next_slot
            if next_float < 8:
                raw = struct.pack("<d", floats[next_float])
                next_float += 1
            else:
                raw = struct.pack("<Q", stack[next_slot])
                next_slot += 1
            return struct.unpack_from(layout, raw)[0]

        arguments: list[Any] = []
        for name, annotation in parameters:
            base = annotation.removesuffix(" | None")
            try:
                if base in _FLOATS_IN_REGISTERS:
                    arguments.append(floating(_FLOATS_IN_REGISTERS[base]))
                elif base in _INTEGERS:
                    arguments.append(_INTEGERS[base](integer()))
                else:
                    address = integer()
                    if address == 0 and base == annotation:
                        raise ArgumentError("must not be null")
                    if address and address < 4096:
                        raise ArgumentError(f"a pointer expected, found the number {address}")
                    arguments.append(_POINTERS[base](address) if address else None)
            except ArgumentError as error:
                raise ArgumentError(f"argument {name}: {error}") from None
        return arguments, integer(), integer()

    return decode


_library = ctypes.CDLL("libascendcl.so")


def describe_call(integers: Any, floats: Any, stack: Any) -> str:
    """What an operator without emulation was called with, as far as it shows: the start of writing its signature."""
    kinds = {
        _TENSOR: "Tensor",
        _SCALAR: "Scalar",
        _INTS: "Ints",
        _FLOATS: "Floats",
        _BOOLS: "Bools",
        _TENSORS: "Tensors",
    }
    words = []
    with open("/proc/self/mem", "rb", buffering=0) as memory:

        def word(address: int, size: int) -> int | None:
            try:
                return int.from_bytes(os.pread(memory.fileno(), size, address), "little") if address >= 4096 else None
            except (OSError, OverflowError):
                return None

        values = [*integers[:6], *stack[:60]]
        for value, following in itertools.pairwise(values):
            kind = kinds.get(word(value, 4) or 0)
            if kind == "Tensor":
                words.append(f"Tensor{list(_Tensor.from_address(value).sizes[: _Tensor.from_address(value).dims])}")
            elif kind:
                words.append(kind)
            elif word(value, 8) == 0 and word(following, 8) == 0:
                break  # the two results
            else:
                words.append(str(_signed(64)(value)))
    return f"integers and pointers ({', '.join(words)}), floats {[float(f'{x:.6g}') for x in floats[:4]]}"
