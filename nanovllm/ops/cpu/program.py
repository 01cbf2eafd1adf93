"""A model's step as a list of kernel calls: recorded once, then run by a single call of C++.

Between two kernels there is nothing left but C++: no Python, no torch, and no interpreter lock, so other threads of the
process run meanwhile. The idea is that of CUDA graphs. But arguments are numbers in memory, so a recording is not bound
to a batch size: each call's number of rows is written into it when the program runs, and one recording serves every
mix of prompts and decodes.

A step can be recorded if it consists of kernels. While the model runs for the recording, kernels are noted instead of
carried out, memory comes from the program's own buffers, and any other operation of torch that would touch a number
ends the attempt: that model then runs call by call, as with ``enforce_eager``.
"""

from __future__ import annotations

import ctypes
import logging
import math
import weakref
from bisect import insort
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanovllm.ops.cpu.attention import Step
from nanovllm.ops.cpu.library import Arguments, Call, Kernel, Library
from nanovllm.ops.cpu.memory import advise_huge_pages
from nanovllm.ops.metadata import AttentionMetadata
from nanovllm.ops.operators import Forward

logger = logging.getLogger("nanovllm")

_ALIGNMENT = 64  # a cache line
_TRIAL_TOKENS = 32  # rows of 2 bytes fill a cache line: sizes are proportional to the number of tokens
_TRIAL_BYTES = 256 << 20  # of addresses


class _NotRecordable(Exception):
    """The step does something that is not a kernel."""


class _Buffers(TorchDispatchMode):
    """Gives tensors memory that returns for others when they die, and lets nothing else happen but views.

    Attributes:
        memory: uint8; addresses are reserved generously, and only what is written takes memory.
        used: bytes of it that some tensor has had.
    """

    def __init__(self, reserve: int) -> None:
        super().__init__()
        self.memory = torch.empty(reserve, dtype=torch.uint8)
        advise_huge_pages(self.memory)
        self.used = 0
        self._taken: list[tuple[int, int]] = []  # intervals, ascending

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to be told apart from the compiler, torch would load all of it: three seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.empty.memory_format:
            return self._empty(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        if func.is_view:
            result = func(*args, **(kwargs or {}))
            memory = args[0].untyped_storage().data_ptr()  # reshape and its kin may have to copy
            if all(x.untyped_storage().data_ptr() == memory for x in tree_leaves(result)):
                return result
        raise _NotRecordable(str(func))

    def _empty(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        start = 0
        for taken, end in self._taken:  # the first gap that is wide enough
            if taken - start >= size:
                break
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
        interval = (start, start + size)
        if interval[1] > self.memory.nbytes:
            raise _NotRecordable(f"{interval[1]} bytes at once")
        insort(self._taken, interval)
        self.used = max(self.used, interval[1])
        array = self.memory.numpy()[start : start + size]  # dies with the last tensor that shares its memory
        weakref.finalize(array, self._taken.remove, interval)
        return torch.from_numpy(array).view(dtype).view(shape)


class Program:
    """A recorded step: call it as one would the model.

    Attributes:
        calls: the kernels and their arguments, in order.
        memory_used: bytes of the buffers that a step of the most tokens writes.
    """

    def __init__(
        self,
        library: Library,
        calls: list[tuple[Kernel, Arguments]],
        buffers: _Buffers,
        inputs: tuple[Tensor, Tensor, Tensor],
        step: Step,
        hidden: Tensor,
    ) -> None:
        self.calls = calls
        self._run = library.run
        self._memory = buffers.memory
        self.memory_used = buffers.used
        self._input_ids, self._positions, self._slots = inputs
        self._step = step
        self._hidden = hidden
        listed = ((ctypes.cast(kernel, ctypes.c_void_p), ctypes.addressof(a)) for kernel, a in calls)  # type: ignore
        self._list = (Call * len(calls))(*(Call(*call) for call in listed))

    def __call__(self, input_ids: Tensor, positions: Tensor, meta: AttentionMetadata) -> Tensor:
        """input_ids, positions int64 [T] -> hidden states [T, hidden], valid until the next call.

        T is at most the number of tokens the program was recorded for.
        """
        tokens = input_ids.shape[0]
        self._input_ids[:tokens] = input_ids
        self._positions[:tokens] = positions
        self._slots[:tokens] = meta.slot_mapping
        step = Step.of(meta)  # must live until the end of the run
        ctypes.pointer(self._step.batch)[0] = step.batch
        self._run(self._list, len(self._list), tokens)
        return self._hidden[:tokens]


def record(library: Library, forward: Forward, max_tokens: int, block_size: int, eager: bool = False) -> Program | None:
    """Record ``forward`` for up to ``max_tokens`` tokens; None if it consists of more than kernels, or if ``eager``."""
    if eager:
        return None
    try:
        # How much memory it takes is proportional to the number of tokens, and found out with a few.
        trial = _trace(library, forward, _TRIAL_TOKENS, block_size, _TRIAL_BYTES)
        units = -(-max_tokens // _TRIAL_TOKENS)
        return _trace(library, forward, units * _TRIAL_TOKENS, block_size, units * trial.memory_used)
    except _NotRecordable as other:
        logger.info("This model's steps run call by call: they use %s, which is none of the CPU's kernels.", other)
        return None


def _trace(library: Library, forward: Forward, tokens: int, block_size: int, reserve: int) -> Program:
    input_ids, positions, slots = (torch.zeros(tokens, dtype=torch.int64) for _ in range(3))
    meta = AttentionMetadata(
        query_start_loc=[0, tokens],
        seq_lens=[tokens],
        num_decodes=0,
        max_query_len=tokens,
        max_seq_len=tokens,
        block_table=torch.zeros(1, 1, dtype=torch.int32),
        slot_mapping=slots,
        block_size=block_size,
    )
    step = meta.backend = Step.of(meta)
    calls = library.recording = []
    buffers = _Buffers(reserve)
    try:
        with buffers:
            hidden = forward(input_ids, positions, meta)
    finally:
        library.recording = None
    return Program(library, calls, buffers, (input_ids, positions, slots), step, hidden)
