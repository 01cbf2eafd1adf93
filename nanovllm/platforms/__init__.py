"""What the engine must know of the machine it runs on. Nothing here imports torch before it must."""

from __future__ import annotations

from nanovllm.errors import ParameterError
from nanovllm.platforms.cpu import CpuPlatform
from nanovllm.platforms.cuda import CudaPlatform, cuda_is_usable, cuda_platform

__all__ = ["CpuPlatform", "CudaPlatform", "Platform", "get_platform"]

Platform = CpuPlatform | CudaPlatform


def get_platform(device: str) -> Platform:
    """The platform of ``device``: "auto" (the best there is), "cpu" or "cuda".

    Raises ParameterError for a device this version has no platform for, or that this machine does not have.
    """
    if device == "cuda" or (device == "auto" and cuda_is_usable()):
        return cuda_platform()
    if device in ("auto", "cpu"):
        return CpuPlatform()
    raise ParameterError(
        "this device is not available in this version; choose 'auto', 'cpu' or 'cuda'", "device", device
    )
