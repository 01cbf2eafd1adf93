"""What the engine must know of the machine it runs on. Nothing here imports torch before it must."""

from __future__ import annotations

from nanovllm.errors import ParameterError
from nanovllm.platforms.cpu import CpuPlatform

__all__ = ["CpuPlatform", "get_platform"]


def get_platform(device: str) -> CpuPlatform:
    """The platform of ``device``: "auto" (the best there is) or "cpu".

    Raises ParameterError for a device this version has no platform for.
    """
    if device in ("auto", "cpu"):
        return CpuPlatform()
    raise ParameterError("this device is not available in this version; choose 'cpu' or 'auto'", "device", device)
