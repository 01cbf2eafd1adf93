"""A GPU that is none: Triton's kernels under its interpreter, and graphs that do what CUDA's do.

A recording holds the operators and launches of a piece of work with their arguments as they were: Python numbers are
frozen, tensors are the memory they had. Replaying it does the same to the same memory, and nothing else. So what was
decided on the host while recording, or a tensor that has moved since, shows as a wrong result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import cuda_device  # noqa: F401 (before Triton)
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from nanovllm.ops import Operators, cuda, torch_operators
from nanovllm.ops.graphs import Work
from nanovllm.platforms import CpuPlatform

HARDWARE = cuda.Hardware((9, 0), 1, 100_000)
_SYNCHRONISING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2"}


class FakeGpu(CpuPlatform):
    """A platform whose steps are planned ahead, as a GPU's are."""

    overlap = True

    def check_cache_dtype(self, name: str) -> None:
        """It has them all."""


def fake_operators(device: str, attention_backend: str | None = None, quantization: str | None = None) -> Operators:
    """The operators of a GPU, as ``operator_table`` gives them; there is nothing here to measure."""
    return cuda.operators(torch_operators(), HARDWARE, attention_backend or "triton", quantization)


class FakeCapture:
    """Takes the place of `CudaCapture`; ``replays`` counts."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, work: Work, plan: object = None) -> tuple[Callable[[], None], Tensor]:
        work()
        tape = Tape()
        with tape.recording():
            result = work()
        result.fill_(torch.nan)  # recording computes nothing
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay, result


class _Watcher(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert name not in _SYNCHRONISING, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """Fail where a GPU would make the host wait: at operators whose shape or value depends on data, and where the
    numbers of a tensor are read."""
    launch, readers = GridExecutor.__call__, ("tolist", "numpy", "cpu", "item")
    own = {name: getattr(Tensor, name) for name in readers}

    def refuse(name: str) -> Callable[..., Any]:
        def read(*_: Any) -> Any:
            raise AssertionError(f"Tensor.{name} waits for the device")

        return read

    def launch_kernel(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes(), _attributes(Tensor, own):  # the interpreter may
            launch(executor, *args, **kwargs)

    refused = {name: refuse(name) for name in readers}
    with _attributes(GridExecutor, {"__call__": launch_kernel}), _attributes(Tensor, refused), _Watcher():
        yield


@contextlib.contextmanager
def _attributes(owner: type, values: dict[str, Any]) -> Iterator[None]:
    """Give a class other attributes for a while."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(owner, name, value)
        yield


class Tape(TorchDispatchMode):
    """Operators and launches in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Callable[[], Any]] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        launch = GridExecutor.__call__

        def record_launch(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                launch(executor, *args, **kwargs)
            self._calls.append(lambda: launch(executor, *args, **kwargs))

        GridExecutor.__call__ = record_launch
        try:
            with self:
                yield
        finally:
            GridExecutor.__call__ = launch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        assert name not in _SYNCHRONISING, f"{name} waits for the device while a step is recorded"
        out = func(*args, **kwargs)
        if func._schema.is_mutable:
            self._calls.append(lambda: func(*args, **kwargs))
        elif not func.is_view:
            made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]

            def again() -> None:
                found = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
                for place, value in zip(made, found, strict=True):
                    place.copy_(value)

            if not name.startswith("aten::empty"):
                self._calls.append(again)
        return out

    def replay(self) -> None:
        for call in self._calls:
            call()
