"""An NVIDIA GPU: its memory and its number formats."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from nanovllm.errors import ParameterError
from nanovllm.platforms.cuda_driver import Gpu, torch_is_built_for_cuda, visible_gpus

_MARGIN = 256 * 2**20  # bytes left free: cuBLAS workspaces, kernels loaded later, the allocator's rounding


class CudaPlatform:
    """The first visible NVIDIA GPU.

    Attributes:
        device: the device name torch and the operator table know.
        overlap: steps run on the GPU while the host plans the next one.
        memory_utilization: share of the GPU's whole memory that this process takes by default; what others use of it
            is respected.
        gpu: what the driver says of it.
    """

    device = "cuda"
    overlap = True
    memory_utilization = 0.92

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

    def available_memory(self) -> int:
        """Bytes of the GPU that are free, of whatever process gave them back or never took them."""
        import torch

        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def memory_budget(self, utilization: float) -> int:
        """Bytes this process may take beyond what it holds now.

        ``utilization`` of the whole memory, less what this process holds, but never more than is free: memory that
        other processes hold is theirs.
        """
        import torch

        total = torch.cuda.mem_get_info()[1]
        own = int(total * utilization) - self.memory_used_by_process()
        return max(0, min(own, self.available_memory() - _MARGIN))

    def peak_memory(self, work: Callable[[], object]) -> int | None:
        """Bytes that ``work`` takes at most beyond what is held before; also compiles the kernels it needs."""
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
        return peak

    def memory_used_by_process(self) -> int:
        """Bytes of GPU memory that tensors of this process hold."""
        import torch

        return torch.cuda.memory_allocated()

    def set_threads(self) -> int:
        """Threads for what is left to the host: tokenising has its own, tensors on the host are few. Returns 1."""
        import torch

        torch.set_num_threads(1)
        return 1

    def sampling(self, num_logits: int) -> AbstractContextManager[None]:
        """Nothing to prepare: logits are on the GPU."""
        return nullcontext()


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
