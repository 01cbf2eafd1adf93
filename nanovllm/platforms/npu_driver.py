"""What CANN says of the machine's NPUs, asked through its own library: no torch, no context, no memory.

So a process that never computes anything (the server's front, the command line) can choose a device without loading
torch. Devices are numbered as in torch: after ``ASCEND_RT_VISIBLE_DEVICES``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache

_LIBRARY = "libascendcl.so"
_PROBE = "import torch, torch_npu; assert torch.npu.device_count() > 0, 'torch_npu sees no NPU'"


@dataclass(frozen=True)
class Cann:
    """What asking CANN has given.

    Attributes:
        count: number of visible NPUs.
        soc: what CANN calls their chip, "Ascend910B2" for instance; "" where it does not say.
        failure: why CANN could not be asked; None if it could.
    """

    count: int = 0
    soc: str = ""
    failure: str | None = None


@lru_cache(maxsize=1)
def ask_cann() -> Cann:
    """The NPUs this process may use."""
    try:
        library = ctypes.CDLL(_LIBRARY)
        count = ctypes.c_uint32()
        library.aclrtGetSocName.restype = ctypes.c_char_p
        status = library.aclrtGetDeviceCount(ctypes.byref(count))
        if status != 0:
            return Cann(failure=f"aclrtGetDeviceCount gave error {status}")
        soc = library.aclrtGetSocName() if count.value else None
    except (OSError, AttributeError) as error:  # no library, or one without these functions
        return Cann(failure=str(error))
    return Cann(count.value, (soc or b"").decode(errors="replace"))


def torch_npu_is_installed() -> bool:
    """Whether there is a torch_npu to import; it is not imported."""
    return "torch_npu" in sys.modules or importlib.util.find_spec("torch_npu") is not None


@lru_cache(maxsize=1)
def why_torch_npu_fails() -> str | None:
    """What goes wrong when torch_npu is imported, tried in a process of its own, which it may take down; None: nothing.

    Takes some seconds.
    """
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    try:
        result = subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if result.returncode == 0:
        return None
    return (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
