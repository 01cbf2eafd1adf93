"""Small arrays on their way to the device, and tensors on their way back, while the device goes on working."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """The array as a tensor on ``device``; on the CPU it shares the array's memory.

    A copy from ordinary memory may make the host wait for everything the device has still to do, so that the array goes
    through pinned memory; torch keeps that until the copy is done.
    """
    host = torch.from_numpy(array)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def upload(array: np.ndarray[Any, Any], target: Tensor) -> None:
    """Copy the array into ``target``, of the same size and dtype, behind the work that still reads it."""
    host = torch.from_numpy(array)
    target.copy_(host if target.device.type == "cpu" else host.pin_memory(), non_blocking=True)


class HostCopy:
    """A tensor on its way to the host, behind the work that makes it; nobody waits until ``wait`` is called."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor
        self._done: Any = None  # an event of the device
        if tensor.device.type != "cpu":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._done = torch.get_device_module(tensor.device).Event()
            self._done.record()

    def wait(self) -> Tensor:
        """The tensor on the host. Waits for the copy, not for work launched after it."""
        if self._done is not None:
            self._done.synchronize()
        return self._host
