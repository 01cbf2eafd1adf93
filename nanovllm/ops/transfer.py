"""Small arrays on their way to the device."""

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
