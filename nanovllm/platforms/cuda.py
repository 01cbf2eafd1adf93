"""An NVIDIA GPU: its memory and its number formats."""

from __future__ import annotations

from nanovllm.errors import ParameterError
from nanovllm.platforms.accelerator import Accelerator
from nanovllm.platforms.cuda_driver import Gpu, torch_is_built_for_cuda, visible_gpus


class CudaPlatform(Accelerator):
    """The first visible NVIDIA GPU.

    Attributes:
        gpu: what the driver says of it.
    """

    device = "cuda"

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def resolve_dtype(self, dtype: str, checkpoint_dtype: str | None) -> str:
        """The dtype to compute in, for what the user asked and what the checkpoint holds (None: it does not say).

        "auto" is float16 for a float16 checkpoint and on GPUs before Ampere, which have no bfloat16; bfloat16 for all
        others, those in float32 too.

        Raises:
            ParameterError: bfloat16 asked for by name on a GPU without it.
        """
        has_bfloat16 = self.gpu.capability >= (8, 0)
        if dtype == "bfloat16" and not has_bfloat16:
            raise ParameterError(
                f"{self.gpu.name} (compute capability {_dotted(self.gpu)}) has no bfloat16, which began with 8.0; "
                "use float16",
                "dtype",
                dtype,
            )
        if dtype != "auto":
            return dtype
        if checkpoint_dtype == "float16" or not has_bfloat16:
            return "float16"
        return "bfloat16"

    def check_cache_dtype(self, name: str) -> None:
        """Raises ParameterError for 8-bit keys and values ("fp8") on a GPU that cannot convert them."""
        if name != "auto" and self.gpu.capability < (8, 9):
            raise ParameterError(
                f"{self.gpu.name} (compute capability {_dotted(self.gpu)}) has no 8-bit floats, which began with 8.9; "
                "use 'auto'",
                "kv_cache_dtype",
                name,
            )


def cuda_platform() -> CudaPlatform:
    """The platform of the first visible GPU.

    Raises:
        ParameterError: no GPU, or a torch without CUDA.
    """
    gpus = visible_gpus()
    if not gpus:
        raise ParameterError(
            "no NVIDIA GPU is visible to this process (is the driver there? what does CUDA_VISIBLE_DEVICES say?); "
            "use 'cpu' or 'auto'",
            "device",
            "cuda",
        )
    if not torch_is_built_for_cuda():
        raise ParameterError(
            f"{gpus[0].name} is there, but the installed torch has no CUDA; install one from pytorch.org that has, "
            "or use 'cpu'",
            "device",
            "cuda",
        )
    return CudaPlatform(gpus[0])


def cuda_is_usable() -> bool:
    """Whether ``cuda_platform()`` would succeed."""
    return bool(visible_gpus()) and torch_is_built_for_cuda()


def _dotted(gpu: Gpu) -> str:
    return ".".join(map(str, gpu.capability))
