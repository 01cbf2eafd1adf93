"""The operators of Ascend NPUs: torch_npu's fused ones for Atlas A2 and A3, and those of the 310P."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from nanovllm.errors import ParameterError
from nanovllm.ops.operators import Forward, Operators

if TYPE_CHECKING:
    from nanovllm.ops.graphs import DecodeGraphs
    from nanovllm.ops.npu.attention import FusedAttention

__all__ = ["current_device", "operators"]

logger = logging.getLogger("nanovllm")


def current_device() -> tuple[Any, bool]:
    """``npu_ops``, and whether the NPU that torch uses is a 310P.

    Raises:
        ParameterError: torch_npu cannot be loaded.
    """
    try:
        import torch

        from nanovllm.ops.npu import npu_ops

        return npu_ops, torch.npu.get_device_name(torch.npu.current_device()).startswith("Ascend310P")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ParameterError(f"torch_npu cannot be loaded: {first}", "device", "npu") from error


def operators(base: Operators, library: Any, is_310p: bool, quantization: str | None = None) -> Operators:
    """``base`` with everything torch_npu does replaced.

    Args:
        library: ``npu_ops``, or what stands for it where there is no NPU.
        is_310p: the chip is a 310P, with a cache and attention of its own.

    Raises:
        ParameterError: a quantization of weights that NPUs have not.
    """
    if quantization is not None:
        from nanovllm.ops.npu.linear import NpuLinear

        base = NpuLinear(base, library, quantization).operators()
    if is_310p:
        from nanovllm.ops.npu.atlas_310p import Atlas310P

        return Atlas310P(base, library).operators()
    from nanovllm.ops.npu.attention import FusedAttention
    from nanovllm.ops.npu.elementwise import NpuElementwise
    from nanovllm.ops.npu.fused import with_fused
    from nanovllm.ops.npu.sampling import NpuSampling

    elementwise, attention = NpuElementwise(base, library), FusedAttention(library)
    table = replace(
        base,
        rms_norm=elementwise.rms_norm,
        add_rms_norm=elementwise.add_rms_norm,
        silu_and_mul=elementwise.silu_and_mul,
        norm_rotate_write=elementwise.norm_rotate_write,
        linear_parts=elementwise.linear_parts,
        prepare_attention=attention.prepare_attention,
        paged_attention=attention.paged_attention,
        record=partial(_record, attention),
        tune=attention.tune,
        choose_by_sorting=True,
        keep_likeliest=NpuSampling(base, library).keep_likeliest,
    )
    return with_fused(table)


def _record(
    attention: FusedAttention, forward: Forward, max_tokens: int, block_size: int, eager: bool = False
) -> DecodeGraphs:
    """See ``reference.record``; eager steps see the same padded batches, so that their results are the same."""
    from nanovllm.ops.graphs import DecodeGraphs

    capture = None
    if not eager:
        from nanovllm.ops.npu.graphs import NpuCapture

        capture = NpuCapture(attention)
    return DecodeGraphs(forward, attention, capture, max_tokens, block_size)
