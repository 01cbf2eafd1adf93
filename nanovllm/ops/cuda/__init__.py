"""The operators of NVIDIA GPUs: Triton kernels, with torch's own products and, where chosen, its flash attention."""

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
    from nanovllm.ops.graphs import DecodeGraphs

__all__ = ["ATTENTION_BACKENDS", "Hardware", "operators"]

logger = logging.getLogger(__name__)

ATTENTION_BACKENDS = ("triton", "torch_varlen")
_TRITON_CAPABILITY = (8, 0)  # Triton compiles for Ampere and later


@dataclass(frozen=True)
class Hardware:
    """What kernels must know of a GPU.

    Attributes:
        capability: (major, minor).
        multiprocessors: number of SMs.
        shared_memory: bytes that one program may use.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int

    @classmethod
    def of_current_device(cls) -> Hardware:
        """The GPU that torch uses."""
        import torch

        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return cls(
            (properties.major, properties.minor),
            properties.multi_processor_count,
            getattr(properties, "shared_memory_per_block_optin", 99 << 10),
        )


def operators(
    base: Operators, hardware: Hardware, attention_backend: str | None = None, quantization: str | None = None
) -> Operators:
    """``base`` with everything the kernels do replaced; ``base`` itself, with a notice, where Triton cannot run.

    ``attention_backend`` is one of ``ATTENTION_BACKENDS``; None takes "triton".

    Raises:
        ParameterError: an attention or a quantization that this GPU, or this installation, does not have.
    """
    missing = _why_no_triton(hardware)
    if missing is not None:
        for parameter, value in (("attention_backend", attention_backend), ("quantization", quantization)):
            if value is not None:
                raise ParameterError(f"{missing}, which this needs", parameter, value)
        logger.warning("%s: running on torch's operators, which are slower", missing)
        return base
    from nanovllm.ops.cuda.attention import TritonAttention
    from nanovllm.ops.cuda.elementwise import CudaElementwise
    from nanovllm.ops.cuda.linear import CudaLinear
    from nanovllm.ops.cuda.penalties import penalise
    from nanovllm.ops.cuda.sampling import choose_tokens
    from nanovllm.ops.cuda.varlen import VarlenAttention

    chosen = VarlenAttention if attention_backend == "torch_varlen" else TritonAttention
    attention = chosen(hardware.multiprocessors, hardware.shared_memory)
    elementwise = CudaElementwise(base)
    linear = CudaLinear(base, quantization, hardware.multiprocessors, hardware.capability)
    logger.info("Attention: %s; products: %s", attention_backend or "triton", quantization or "torch")
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
    )


def _record(
    attention: TritonAttention, forward: Forward, max_tokens: int, block_size: int, eager: bool = False
) -> DecodeGraphs:
    """See ``reference.record``; eager steps see the same padded batches, so that their results are the same."""
    from nanovllm.ops.cuda.graphs import CudaCapture, DecodePlans
    from nanovllm.ops.graphs import DecodeGraphs

    return DecodeGraphs(forward, DecodePlans(attention), None if eager else CudaCapture(), max_tokens, block_size)


def _why_no_triton(hardware: Hardware) -> str | None:
    if hardware.capability < _TRITON_CAPABILITY:
        return f"Triton does not compile for compute capability {'.'.join(map(str, hardware.capability))}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None
