"""The operators of NVIDIA GPUs: Triton kernels, torch's own products, and attention of other libraries where faster."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from nanovllm.errors import ParameterError
from nanovllm.ops.operators import Forward, Operators

if TYPE_CHECKING:
    from nanovllm.ops.cuda.attention import TritonAttention
    from nanovllm.ops.cuda.measured import MeasuredAttention
    from nanovllm.ops.graphs import DecodeGraphs

__all__ = ["ATTENTION_BACKENDS", "Hardware", "operators"]

logger = logging.getLogger(__name__)

ATTENTION_BACKENDS = ("triton", "torch_varlen", "flash_attn", "flashinfer")
_TRITON_CAPABILITY = (8, 0)  # Triton compiles for Ampere and later


@dataclass(frozen=True)
class Hardware:
    """What kernels must know of a GPU.

    Attributes:
        capability: (major, minor).
        multiprocessors: number of SMs.
        shared_memory: bytes that one program may use.
        name: of the product.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    name: str = ""

    @classmethod
    def of_current_device(cls) -> Hardware:
        """The GPU that torch uses.

        Raises:
            ParameterError: the installed torch has no code for it.
        """
        import torch

        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        capability = properties.major, properties.minor
        known = torch.cuda.get_arch_list()
        if not _runs_on(capability, known):
            raise ParameterError(
                f"{properties.name} has compute capability {_dotted(capability)}, and torch {torch.__version__} is "
                f"built for {', '.join(known)} only; install a torch for another CUDA (see pytorch.org), or use 'cpu'",
                "device",
                "cuda",
            )
        return cls(
            capability,
            properties.multi_processor_count,
            getattr(properties, "shared_memory_per_block_optin", 99 << 10),
            properties.name,
        )


def operators(
    base: Operators, hardware: Hardware, attention_backend: str | None = None, quantization: str | None = None
) -> Operators:
    """``base`` with everything the kernels do replaced; ``base`` itself, with a notice, where Triton cannot run.

    ``attention_backend`` is one of ``ATTENTION_BACKENDS``; with None, ``tune`` chooses by measurement among those that
    are installed.

    Raises:
        ParameterError: an attention or a quantization that this GPU, or this installation, does not have.
    """
    missing = _why_no_triton(hardware)
    if missing is not None:
        for parameter, value in (("attention_backend", attention_backend), ("quantization", quantization)):
            if value is not None:
                raise ParameterError(f"{missing}, which this needs; leave it out", parameter, value)
        logger.warning("%s: running on torch's operators, which are slower", missing)
        return base
    from nanovllm.ops.cuda.elementwise import CudaElementwise
    from nanovllm.ops.cuda.linear import CudaLinear
    from nanovllm.ops.cuda.penalties import penalise
    from nanovllm.ops.cuda.sampling import choose_tokens

    measured = _measured(hardware) if attention_backend is None else None
    attention = measured or _attention(attention_backend or "triton", hardware)
    elementwise = CudaElementwise(base)
    linear = CudaLinear(base, quantization, hardware.multiprocessors, hardware.capability)
    logger.info("Attention: %s; products: %s", attention_backend or "to be measured", quantization or "torch")
    return replace(
        base,
        rms_norm=elementwise.rms_norm,
        add_rms_norm=elementwise.add_rms_norm,
        silu_and_mul=elementwise.silu_and_mul,
        gelu_and_mul=elementwise.gelu_and_mul,
        copy_blocks=elementwise.copy_blocks,
        pack_linear=linear.pack_linear,
        linear=linear.linear,
        weight_rows=linear.weight_rows,
        norm_rotate_write=elementwise.norm_rotate_write,
        prepare_attention=attention.prepare_attention,
        paged_attention=attention.paged_attention,
        record=partial(_record, attention),
        choose=choose_tokens,
        penalise=penalise,
        tune=None if measured is None else measured.tune,
    )


def _attention(name: str, hardware: Hardware) -> TritonAttention:
    """Raises ParameterError if it is not installed."""
    sizes = hardware.multiprocessors, hardware.shared_memory
    if name == "torch_varlen":
        from nanovllm.ops.cuda.varlen import VarlenAttention

        return VarlenAttention(*sizes)
    if name == "flash_attn":
        from nanovllm.ops.cuda.flash_attn import FlashAttention

        return FlashAttention(*sizes, hardware.capability)
    if name == "flashinfer":
        from nanovllm.ops.cuda.flashinfer import FlashInferAttention

        return FlashInferAttention(*sizes)
    from nanovllm.ops.cuda.attention import TritonAttention

    return TritonAttention(*sizes)


def _measured(hardware: Hardware) -> MeasuredAttention:
    """Those that are installed, to choose from."""
    from nanovllm.ops.cuda.flashinfer import is_ready
    from nanovllm.ops.cuda.measured import MeasuredAttention, cache_folder, device_seconds, versions

    candidates = {}
    for name in ATTENTION_BACKENDS:
        if name == "flashinfer" and not is_ready():
            continue
        try:
            candidates[name] = _attention(name, hardware)
        except ParameterError:
            continue
    device = f"{hardware.name}; {versions()}"
    return MeasuredAttention(
        hardware.multiprocessors, hardware.shared_memory, candidates, device, device_seconds, cache_folder()
    )


def _record(
    attention: TritonAttention, forward: Forward, max_tokens: int, block_size: int, eager: bool = False
) -> DecodeGraphs:
    """See ``reference.record``; eager steps see the same padded batches, so that their results are the same."""
    from nanovllm.ops.cuda.graphs import CudaCapture, DecodePlans
    from nanovllm.ops.graphs import DecodeGraphs

    return DecodeGraphs(forward, DecodePlans(attention), None if eager else CudaCapture(), max_tokens, block_size)


def _runs_on(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether code for one of ``architectures`` runs on a GPU.

    Machine code (sm_86) runs on GPUs of its generation from there on, intermediate code (compute_90) on all later ones.
    """
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        number = "".join(filter(str.isdigit, digits))  # sm_90a
        built = int(number[:-1]), int(number[-1])
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return not architectures


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _why_no_triton(hardware: Hardware) -> str | None:
    if hardware.capability < _TRITON_CAPABILITY:
        return f"Triton does not compile for compute capability {_dotted(hardware.capability)}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None
