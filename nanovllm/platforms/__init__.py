"""What the engine must know of the machine it runs on. Nothing here imports torch before it must."""

from __future__ import annotations

from nanovllm.errors import ParameterError
from nanovllm.platforms.cpu import CpuPlatform
from nanovllm.platforms.cuda import CudaPlatform, cuda_is_usable, cuda_platform
from nanovllm.platforms.npu import NpuPlatform, leave_torch_npu_alone, npu_is_usable, npu_platform

__all__ = ["CpuPlatform", "CudaPlatform", "NpuPlatform", "Platform", "get_platform"]

Platform = CpuPlatform | CudaPlatform | NpuPlatform


def get_platform(device: str) -> Platform:
    """The platform of ``device``: "auto" (the best there is), "cpu", "cuda" or "npu".

    Raises ParameterError for a device this version has no platform for, or that this machine does not have.
    """
    leave_torch_npu_alone()
    if device == "cuda" or (device == "auto" and cuda_is_usable()):
        return cuda_platform()
    if device == "npu" or (device == "auto" and npu_is_usable()):
        return npu_platform()
    if device in ("auto", "cpu"):
        return CpuPlatform()
    raise ParameterError(
        "this device is not available in this version; choose 'auto', 'cpu', 'cuda' or 'npu'", "device", device
    )
