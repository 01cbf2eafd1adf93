"""An Ascend NPU: which chips there are, their number formats, and how torch_npu is loaded.

torch_npu, once installed, loads itself together with torch, and where it is broken torch cannot be imported any more.
So this package switches that off (``TORCH_DEVICE_BACKEND_AUTOLOAD=0``) and loads torch_npu itself, only where an NPU is
used: a broken one is a diagnosis there, and nothing at all elsewhere.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass

from nanovllm.errors import ParameterError
from nanovllm.platforms.accelerator import Accelerator
from nanovllm.platforms.npu_driver import ask_cann, torch_npu_is_installed, why_torch_npu_fails

logger = logging.getLogger("nanovllm")

_SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
_NO_DEVICE = "; 'nanovllm doctor' looks further. Use 'cpu' meanwhile"


@dataclass(frozen=True)
class Chip:
    """What the engine must know of an NPU.

    Attributes:
        soc: CANN's name of the chip.
        is_310p: an Atlas inference card (300I Duo, 300I Pro, 300V), with operators and a cache layout of its own.
    """

    soc: str
    is_310p: bool

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Tokens in a block of the KV cache, as its attention operators take them."""
        return (64, 128) if self.is_310p else tuple(range(16, 1024 + 1, 16))


def chip_of(soc: str) -> Chip:
    """The chip that CANN calls ``soc``.

    Raises:
        ParameterError: one whose operators are others than ours.
    """
    if soc.startswith("Ascend310P"):
        return Chip(soc, is_310p=True)
    # The first generation has no digit behind its letter: Ascend910A, Ascend910B, Ascend910ProB.
    if soc.startswith(("Ascend310", "Ascend910A", "Ascend910Pro", "Ascend910Premium")) or soc == "Ascend910B":
        raise ParameterError(
            f"{soc} has no operators for paged attention that this engine knows; it runs on Atlas A2 and A3 "
            "(Ascend910B1-4, Ascend910_93) and on the 310P",
            "device",
            "npu",
        )
    if not soc.startswith(("Ascend910B", "Ascend910_93")):
        logger.warning("npu: chip %r is not known; taken for an Atlas A2", soc)
    return Chip(soc, is_310p=False)


class NpuPlatform(Accelerator):
    """The first visible NPU.

    Attributes:
        chip: what CANN says of it.
    """

    device = "npu"
    memory_utilization = 0.9
    block_size = 128

    def __init__(self, chip: Chip) -> None:
        self.chip = chip

    def load(self) -> None:
        """Load torch_npu.

        Raises:
            ParameterError: it cannot be loaded, sees no NPU, or another chip than CANN spoke of.
        """
        version, soc = load_torch_npu()
        if soc.startswith("Ascend310P") != self.chip.is_310p:
            raise ParameterError(
                f"CANN calls the chip {self.chip.soc!r}, torch_npu {soc!r}{_NO_DEVICE}", "device", "npu"
            )
        emulated = os.environ.get("NANOVLLM_NPU_EMULATED") == "1"
        logger.log(
            logging.WARNING if emulated else logging.INFO,
            "npu: %s, torch_npu %s",
            "emulated" if emulated else self.chip.soc,
            version,
        )

    def resolve_dtype(self, dtype: str, checkpoint_dtype: str | None) -> str:
        """The dtype to compute in, for what the user asked and what the checkpoint holds (None: it does not say).

        "auto" is float16 for a float16 checkpoint and on a 310P, which has nothing else; bfloat16 for all others, those
        in float32 too.

        Raises:
            ParameterError: another than float16 asked for by name on a 310P.
        """
        if self.chip.is_310p and dtype not in ("auto", "float16"):
            raise ParameterError(
                f"{self.chip.soc} has no {dtype} in its attention operators; use float16 (--dtype float16)",
                "dtype",
                dtype,
            )
        if dtype != "auto":
            return dtype
        return "float16" if self.chip.is_310p or checkpoint_dtype == "float16" else "bfloat16"

    def check_cache_dtype(self, name: str) -> None:
        """Raises ParameterError unless the KV cache is in the model's dtype ("auto")."""
        if name != "auto":
            raise ParameterError(
                "on an NPU, keys and values have the model's dtype; use 'auto'", "kv_cache_dtype", name
            )

    def check_quantization(self, name: str | None) -> None:
        """Raises ParameterError for weights that no operator of an NPU multiplies."""
        if name not in (None, "int8"):
            raise ParameterError(
                "an NPU multiplies weights in 8 bits or as they are; use 'int8' or leave it out", "quantization", name
            )

    def check_block_size(self, block_size: int) -> None:
        """Raises ParameterError for blocks that no attention operator of the chip reads."""
        if block_size not in self.chip.block_sizes:
            allowed = "64 or 128" if self.chip.is_310p else "a multiple of 16 up to 1024; 128 suits every model"
            raise ParameterError(f"on {self.chip.soc}, a block has {allowed} tokens", "block_size", block_size)


def npu_platform() -> NpuPlatform:
    """The platform of the first visible NPU.

    Raises:
        ParameterError: no torch_npu, no CANN, no NPU, or a chip this engine does not know.
    """
    if not torch_npu_is_installed():
        raise ParameterError(
            "torch-npu is not installed; install the one of your torch (2.13.0 for torch 2.13.0), see docs/ascend.md",
            "device",
            "npu",
        )
    cann = ask_cann()
    if cann.failure is not None:
        raise ParameterError(
            f"CANN does not answer: {cann.failure}. Is it installed, and its environment set ({_SET_ENV})?{_NO_DEVICE}",
            "device",
            "npu",
        )
    if cann.count == 0:
        raise ParameterError(
            "no NPU is visible to this process (what do npu-smi info and ASCEND_RT_VISIBLE_DEVICES say? does the "
            f"container have /dev/davinci0?){_NO_DEVICE}",
            "device",
            "npu",
        )
    return NpuPlatform(chip_of(cann.soc))


def npu_is_usable() -> bool:
    """Whether ``npu_platform()`` would succeed, and torch_npu load. Warns where there is an NPU but no way to use
    it."""
    if not torch_npu_is_installed():
        return False
    if ask_cann().count == 0:
        return False
    try:
        chip_of(ask_cann().soc)
    except ParameterError as error:
        failure: str | None = str(error)
    else:
        failure = why_torch_npu_fails()
    if failure is not None:
        logger.warning("There is an NPU, but it cannot be used: %s ('nanovllm doctor' looks further)", failure)
    return failure is None


def leave_torch_npu_alone() -> None:
    """Keep torch from loading torch_npu by itself; see above. Too late if torch is loaded, and not if the user has
    decided."""
    if "torch" not in sys.modules and torch_npu_is_installed():
        os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


def load_torch_npu() -> tuple[str, str]:
    """Import torch_npu; returns its version and its name of the chip.

    Raises:
        ParameterError: it cannot be loaded, or sees no NPU; the message says what it said.
    """
    try:
        import torch
        import torch_npu

        count = torch.npu.device_count()
        soc = torch.npu.get_device_name(0) if count else ""
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ParameterError(
            f"torch_npu cannot be loaded: {first}. Do the versions of torch, torch-npu and CANN go together, and is "
            f"their environment set ({_SET_ENV}, and nnal/atb/set_env.sh)?{_NO_DEVICE}",
            "device",
            "npu",
        ) from error
    if count == 0:
        raise ParameterError(
            f"torch_npu sees no NPU; is the driver running (npu-smi info)?{_NO_DEVICE}", "device", "npu"
        )
    return torch_npu.__version__, soc
