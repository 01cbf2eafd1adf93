"""Compile the Triton kernels for a GPU that need not be there: ``python tests/cuda_compile.py 90``.

Runs the operators on CPU tensors with every launch turned into a compilation, down to machine code, and prints one JSON
object: for each kernel its name, the bytes of its code, the shared memory it takes, and which matrix units it uses.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
import triton
from paged import make_metadata
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from nanovllm.ops import torch_operators
from nanovllm.ops.cuda.attention import TritonAttention
from nanovllm.ops.cuda.elementwise import CudaElementwise
from nanovllm.ops.cuda.linear import CudaLinear
from nanovllm.ops.cuda.penalties import penalise
from nanovllm.ops.cuda.sampling import Choices, choose


class Driver:
    """As much of a driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(capability: int, shared_memory: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Compile what a model in ``dtype`` uses."""
    compiled: list[dict[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        ptx = kernel.asm["ptx"]
        compiled.append({
            "kernel": self.fn.__name__,
            "bytes": len(kernel.asm["cubin"]),
            "shared": kernel.metadata.shared,
            "tensor cores": next((name for name in ("tcgen05.mma", "wgmma.mma", "mma.sync") if name in ptx), None),
        })  # fmt: skip
        return kernel

    triton.runtime.driver.set_active(Driver(capability))
    JITFunction.run = compile_only
    generation = (capability // 10, capability % 10)
    elementwise, attention = CudaElementwise(torch_operators()), TritonAttention(132, shared_memory)
    x, weight = torch.zeros(16, 1024, dtype=dtype), torch.zeros(1024, dtype=dtype)
    elementwise.rms_norm(x, weight, 1e-6)
    elementwise.add_rms_norm(x, x, weight, 1e-6)
    elementwise.silu_and_mul(x)
    elementwise.gelu_and_mul(x, "tanh")
    qkv, turn = torch.zeros(10, 32, 128, dtype=dtype), torch.zeros(10, 1, 128, dtype=dtype)
    caches = [torch.zeros(5, 16, 8, 128, dtype=dtype) for _ in range(2)]
    meta = make_metadata([[1, 2], [3, 4]], [20, 3], [1, 9], 16)
    elementwise.norm_rotate_write(qkv, weight[:128], weight[:128], 1e-6, turn, turn, *caches, meta.slot_mapping)
    elementwise.copy_blocks([(caches[0], caches[1])], [1], [2])
    attention.prepare_attention(meta, [None, 8], dtype)
    q = qkv[:, :16].contiguous()
    for window in (None, 8):
        attention.paged_attention(q, *caches, meta, 0.1, window)
    if generation >= (8, 9):
        eight = [cache.to(torch.float8_e4m3fn) for cache in caches]
        attention.paged_attention(q, *eight, meta, 0.1, None)
    for kind in ("int8", "int4", "w8a8"):
        linear = CudaLinear(torch_operators(), kind, 132, generation)
        packed = linear.pack_linear(torch.zeros(256, 1024, dtype=dtype))
        for rows in (1, 200) if kind == "int4" else (200,):
            linear.linear(torch.zeros(rows, 1024, dtype=dtype), packed, None)
    numbers = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    choices = Choices(numbers[0], numbers[1].int(), numbers[0], numbers[0], numbers[1], numbers[1])
    choose(torch.zeros(4, 151_936), choices)
    which = np.arange(4)
    amounts = np.full(4, 0.5, np.float32)
    penalise(torch.zeros(4, 151_936), torch.zeros(4, 64).int(), which, which, which + 9, which, *[amounts] * 3)
    return compiled


if __name__ == "__main__":
    wanted = int(sys.argv[1])
    print(json.dumps(compile_all(wanted, {80: 163, 89: 99}.get(wanted, 227) << 10, torch.bfloat16)))
