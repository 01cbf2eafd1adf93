"""The table of emulated operators, and the two callbacks through which the C library prepares and runs them.

An operator is a Python function named by ``@operator``. Its body is what the device does; it may run many times (graph
replays). ``check`` is what the host does at submission: it sees the same arguments but must not read tensors' values.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import ctypes
import itertools
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .decode import ArgumentError, describe_call, signature_decoder

library = ctypes.CDLL("libascendcl.so")
library.emulated_new_executor.restype = ctypes.c_void_p
library.emulated_new_executor.argtypes = [ctypes.c_int, ctypes.c_int64]
library.emulated_submit.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64]

_INVALID_ARGUMENT = 161002  # ACLNN_ERR_PARAM_INVALID
_NOT_EMULATED = 561003
_DEVICE_EXCEPTION = 507015  # ACL_ERROR_RT_AICORE_EXCEPTION

library.aclrtGetSocName.restype = ctypes.c_char_p
SOC = library.aclrtGetSocName().decode()
IS_310P = SOC.startswith("Ascend310P")


class ConstraintError(Exception):
    """A documented constraint of an operator is violated."""


def require(condition: bool, message: str) -> None:
    """Raise a ConstraintError unless the documented condition holds."""
    if not condition:
        raise ConstraintError(message)


class Operator:
    """An emulated operator: its name, what the device does, what the host checks, and how arguments are read."""

    def __init__(self, name: str, run: Callable, check: Callable | None) -> None:
        self.name, self.run, self.check = name, run, check
        self.decode = signature_decoder(run)


OPERATORS: dict[str, Operator] = {}
launched: collections.Counter[str] = collections.Counter()
"""How often each operator was submitted, in this process."""


def operator(*names: str, check: Callable | None = None) -> Callable[[Callable], Callable]:
    """Register a function as the operators ``aclnn<name>`` for each of ``names``."""

    def register(function: Callable) -> Callable:
        for name in names:
            if f"aclnn{name}" in OPERATORS:
                raise ValueError(f"aclnn{name} is registered twice")
            OPERATORS[f"aclnn{name}"] = Operator(f"aclnn{name}", function, check)
        return function

    return register


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Whatever the engine set (default device and dtype, inference mode), kernels run in plain torch on the CPU."""
    kind = torch.get_default_dtype()
    with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
        if kind is not torch.float32:
            torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            if kind is not torch.float32:
                torch.set_default_dtype(kind)


# ---- closures: what tasks run -------------------------------------------------------------------------------------

_closures: dict[int, tuple[str, Callable[[], None]]] = {}
_next_closure = itertools.count(1)
_released = (ctypes.c_int64 * 256)()


def keep_closure(name: str, closure: Callable[[], None]) -> int:
    """Keep a closure until the C library says that no task or graph will run it again."""
    while count := library.emulated_take_released(_released, 256):
        for index in _released[:count]:
            _closures.pop(index, None)
    index = next(_next_closure)
    _closures[index] = (name, closure)
    return index


def submit(stream: int, name: str, closure: Callable[[], None]) -> None:
    """Submit work that did not come through an aclnn call to a stream, as a task like every other."""
    launched[name] += 1
    text = _NAMES.setdefault(name, name.encode())
    if library.emulated_submit(stream, text, keep_closure(name, closure)):
        library.aclGetRecentErrMsg.restype = ctypes.c_char_p
        raise RuntimeError(library.aclGetRecentErrMsg().decode())


_NAMES: dict[str, bytes] = {}  # kept: the C library holds pointers to them


def _fail(code: int, text: str) -> int:
    return library.emulated_fail(code, text.encode())


def _prepare(name_index: int, integers: Any, floats: Any, stack: Any) -> int:
    name = _operator_names[name_index].decode()
    found = OPERATORS.get(name)
    if found is None:
        call = describe_call(integers, floats, stack)
        return _fail(_NOT_EMULATED, f"{name} is not emulated (write it in tests/npu/emulator/kernels): {call}")
    try:
        with plain_torch():
            arguments, workspace, executor = found.decode(integers, floats, stack)
            _check_result_pointers(workspace, executor)
            if found.check:
                found.check(*arguments)
    except (ArgumentError, ConstraintError) as error:
        return _fail(_INVALID_ARGUMENT, f"{name}: {error}")
    except Exception:
        return _fail(_NOT_EMULATED, f"{name}: {traceback.format_exc()}")
    launched[name] += 1
    index = keep_closure(name, lambda: found.run(*arguments))
    ctypes.c_uint64.from_address(workspace).value = 0
    ctypes.c_uint64.from_address(executor).value = library.emulated_new_executor(name_index, index)
    return 0


def _check_result_pointers(workspace: int, executor: int) -> None:
    """Behind the last argument come two pointers to zeros; anything else means that the signature is wrong."""
    for pointer in (workspace, executor):
        if pointer < 4096 or pointer % 8 or ctypes.c_uint64.from_address(pointer).value != 0:
            raise ArgumentError("the operator has another number of arguments than its emulation")


def _run(index: int) -> int:
    name, closure = _closures[index]
    try:
        with plain_torch():
            closure()
    except ConstraintError as error:
        return _fail(_DEVICE_EXCEPTION, f"{name}: {error}")
    except Exception:
        return _fail(_DEVICE_EXCEPTION, f"{name}: {traceback.format_exc()}")
    return 0


_U64, _F64 = ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_double)
_callbacks = (
    ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, _U64, _F64, _U64)(_prepare),
    ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64)(_run),
)
_count = ctypes.c_uint64.in_dll(library, "emulated_operator_count").value
_operator_names = (ctypes.c_char_p * _count).in_dll(library, "emulated_operator_names")


def install() -> None:
    """Give the C library its callbacks; from the interpreter's end on, work that is left does nothing."""
    library.emulated_set_kernels(*_callbacks)
    atexit.register(library.emulated_set_kernels, None, None)
