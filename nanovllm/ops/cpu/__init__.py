"""The CPU's own operators: C++ kernels (csrc/), chosen for the instruction set of the machine."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import torch

from nanovllm.errors import ParameterError
from nanovllm.ops.operators import Operators

__all__ = ["operators"]

logger = logging.getLogger(__name__)


def operators(base: Operators, quantization: str | None = None) -> Operators:
    """``base`` with everything the kernels do replaced; ``base`` itself, with a notice, where none are built.

    What the kernels do not cover (number formats, shapes) still goes to ``base``.
    """
    from nanovllm.ops.cpu.attention import CpuAttention
    from nanovllm.ops.cpu.elementwise import Elementwise
    from nanovllm.ops.cpu.library import load_library
    from nanovllm.ops.cpu.linear import CpuLinear
    from nanovllm.ops.cpu.memory import new_caches
    from nanovllm.ops.cpu.program import record
    from nanovllm.ops.cpu.sampling import Sampling

    library = load_library()
    if library is None and quantization is not None:
        raise ParameterError(
            "weights are quantised by C++ kernels, and none are built: python -m nanovllm.ops.cpu.build",
            "quantization",
            quantization,
        )
    if library is None:
        logger.warning("No C++ kernels: running on torch's operators. Build them: python -m nanovllm.ops.cpu.build")
        return base
    library.set_threads(torch.get_num_threads())
    attention, elementwise, linear = (
        CpuAttention(library, base),
        Elementwise(library, base),
        CpuLinear(library, base, quantization),
    )
    sampling = Sampling(library)
    return replace(
        base,
        rms_norm=elementwise.rms_norm,
        add_rms_norm=elementwise.add_rms_norm,
        silu_and_mul=elementwise.silu_and_mul,
        norm_rotate_write=elementwise.norm_rotate_write,
        allocate_matrix=linear.allocate_matrix,
        pack_linear=linear.pack_linear,
        linear=linear.linear,
        weight_rows=linear.rows,
        prepare_attention=attention.prepare_attention,
        paged_attention=attention.paged_attention,
        record=partial(record, library),
        choose=sampling.choose,
        penalise=sampling.penalise,
        new_caches=new_caches,
    )
