"""What GPUs and NPUs have in common: memory of their own, and a host that only launches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

_MARGIN = 256 * 2**20  # bytes left free: workspaces of libraries, kernels loaded later, the allocator's rounding


class Accelerator:
    """The current device of torch's module for ``device``.

    Attributes:
        device: the device name torch and the operator table know.
        overlap: steps run on the device while the host plans the next one.
        memory_utilization: share of the device's whole memory that this process takes by default; what others use of
            it is respected.
        block_size: tokens in a block of the KV cache, by default.
        step_tokens: most tokens in a step, by default.
    """

    device: str
    overlap = True
    memory_utilization = 0.92
    block_size = 16
    step_tokens = 4096

    def load(self) -> None:
        """Make torch know the device; called once, where the model runs."""

    def check_quantization(self, name: str | None) -> None:
        """Raises ParameterError for weights that the device does not multiply. Here the operators say so."""

    def check_block_size(self, block_size: int) -> None:
        """Raises ParameterError for blocks that no attention of the device reads. Here any will do."""

    def available_memory(self) -> int:
        """Bytes of the device that are free, of whatever process gave them back or never took them."""
        device = self._torch()
        return device.mem_get_info()[0] + device.memory_reserved() - device.memory_allocated()

    def memory_budget(self, utilization: float) -> int:
        """Bytes this process may take beyond what it holds now.

        ``utilization`` of the whole memory, less what this process holds, but never more than is free: memory that
        other processes hold is theirs.
        """
        total = self._torch().mem_get_info()[1]
        own = int(total * utilization) - self.memory_used_by_process()
        return max(0, min(own, self.available_memory() - _MARGIN))

    def peak_memory(self, work: Callable[[], object]) -> int | None:
        """Bytes that ``work`` takes at most beyond what is held before; also compiles the kernels it needs."""
        device = self._torch()
        device.reset_peak_memory_stats()
        before = device.memory_allocated()
        work()
        device.synchronize()
        peak = device.max_memory_allocated() - before
        device.empty_cache()
        return peak

    def memory_used_by_process(self) -> int:
        """Bytes of the device's memory that tensors of this process hold."""
        return self._torch().memory_allocated()

    def set_threads(self) -> int:
        """Threads for what is left to the host: tokenising has its own, tensors on the host are few. Returns 1."""
        import torch

        torch.set_num_threads(1)
        return 1

    def sampling(self, num_logits: int) -> AbstractContextManager[None]:
        """Nothing to prepare: logits are on the device."""
        return nullcontext()

    def _torch(self) -> Any:
        """torch.cuda or torch.npu."""
        import torch

        return torch.get_device_module(self.device)
