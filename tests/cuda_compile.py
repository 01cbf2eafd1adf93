"""Compile the Triton kernels for GPUs that need not be there, down to machine code:

    python tests/cuda_compile.py 90            # a choice that covers every kernel
    python tests/cuda_compile.py --full 80 86 89 90 100 120     # everything the product selects; some minutes each

Runs the operators on CPU tensors with every launch turned into a compilation, and prints one JSON object per kernel
and line: its name and constants, the bytes of its code, the registers of a thread, the bytes that spill out of them,
the shared memory of a program, which matrix units it uses, and whether it loads 16 bytes at a time ahead of their use.
With --full, what does not compile is printed, too.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from paged import make_metadata
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from nanovllm.ops import torch_operators
from nanovllm.ops.cuda.attention import TritonAttention
from nanovllm.ops.cuda.elementwise import CudaElementwise
from nanovllm.ops.cuda.linear import CudaLinear
from nanovllm.ops.cuda.penalties import penalise
from nanovllm.ops.cuda.sampling import choose_tokens

# Bytes that one program may use, by compute capability (CUDA C++ Programming Guide, table of technical specifications).
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
FLOAT8 = torch.float8_e4m3fn
Work = Callable[[], object]


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


class Compiler:
    """Turns launches into compilations for one GPU; what has been compiled is not compiled again."""

    def __init__(self, capability: int) -> None:
        self.found: list[dict[str, Any]] = []
        self._met: set[str] = set()
        run = JITFunction.run

        def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
            if kernel.hash not in self._met:
                self._met.add(kernel.hash)
                self.found.append(self._describe(function, kernel, args, kwargs))
            return kernel

        triton.runtime.driver.set_active(Driver(capability))
        JITFunction.run = compile_only

    @staticmethod
    def _describe(function: Any, kernel: Any, args: Any, kwargs: Any) -> dict[str, Any]:
        ptx, code = kernel.asm["ptx"], kernel.asm["cubin"]
        dtypes = [str(arg.dtype).removeprefix("torch.") for arg in args if isinstance(arg, Tensor)]
        return {
            "kernel": function.fn.__name__,
            "dtypes": dtypes[:2],
            "constants": {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)},
            "bytes": len(code),
            **_resources(code),
            "shared": kernel.metadata.shared,
            "tensor cores": next((name for name in ("tcgen05.mma", "wgmma.mma", "mma.sync") if name in ptx), None),
            "loads ahead": "cp.async.cg" in ptx,  # 16 bytes at a time
        }


def _resources(code: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its memory: what did not fit into registers."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout))
    return {"registers": int(usage["REG"]), "spilled": max(int(usage["STACK"]), int(usage["LOCAL"]))}


# ---- what is launched -----------------------------------------------------------------------------------------------


def _attention(
    shared: int, dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, group: int, windowed: bool
) -> None:
    """Decodes, their pieces merged, and longer queries, of one model, in steps of several sizes."""
    attention = TritonAttention(132, shared)
    caches = [torch.zeros(5, 16, 2, head_dim, dtype=dtype).to(kv_dtype) for _ in range(2)]
    window = 8 if windowed else None
    for decodes, longer in ((1, 1), (2, 1), (4, 2)):
        new = [1] * decodes + [9] * longer
        meta = make_metadata([[1, 2]] * len(new), [20] * decodes + [3] * longer, new, 16)
        attention.prepare_attention(meta, [window], dtype)
        q = torch.zeros(sum(new), 2 * group, head_dim, dtype=dtype)
        attention.paged_attention(q, *caches, meta, 0.1, window)


def _elementwise(dtype: torch.dtype, kv_dtype: torch.dtype, hidden: int, head_dim: int) -> None:
    """Norms, activations, and the way of queries, keys and values to attention."""
    elementwise = CudaElementwise(torch_operators())
    weight = torch.zeros(hidden, dtype=dtype)
    for rows in (1, 3, 16):
        x = torch.zeros(rows, hidden, dtype=dtype)
        elementwise.rms_norm(x, weight, 1e-6)
        elementwise.add_rms_norm(x, x, weight, 1e-6)
        elementwise.silu_and_mul(x)
    for approximate in ("tanh", "none"):
        elementwise.gelu_and_mul(x, approximate)
    qkv, turn = torch.zeros(10, 32, head_dim, dtype=dtype), torch.zeros(10, 1, head_dim, dtype=dtype)
    scale = torch.zeros(head_dim, dtype=dtype)
    elementwise.rms_norm(qkv[:, :4], scale, 1e-6)
    caches = [torch.zeros(5, 16, 8, head_dim, dtype=dtype).to(kv_dtype) for _ in range(2)]
    slots = torch.arange(10)
    for norm in (scale, None):
        elementwise.norm_rotate_write(qkv, norm, norm, 1e-6, turn, turn, *caches, slots)
    for count in (1, 3):
        elementwise.copy_blocks([(caches[0], caches[1])], [1] * count, [2, 3, 4][:count])


def _products(kind: str, capability: int, dtype: torch.dtype, rows: int, bias: bool, multiprocessors: int) -> None:
    """A product with a quantised weight; many multiprocessors split its inputs, one does not."""
    generation = (capability // 10, capability % 10)
    linear = CudaLinear(torch_operators(), kind, multiprocessors, generation)
    packed = linear.pack_linear(torch.zeros(256, 1024, dtype=dtype))
    linear.linear(torch.zeros(rows, 1024, dtype=dtype), packed, torch.zeros(256, dtype=dtype) if bias else None)


def _sampling(vocab_size: int) -> None:
    for rows in (1, 2, 3, 4, 16):
        which, half = np.arange(rows), np.full(rows, 0.5, np.float32)
        choose_tokens(torch.zeros(rows, vocab_size), half, np.zeros(rows, np.int32), half, half, which, which)
        penalise(
            torch.zeros(rows, vocab_size), torch.zeros(rows, 64).int(), which, which, which + 9, which, *[half] * 3
        )


def selected(capability: int, full: bool) -> Iterator[tuple[str, Work]]:
    """What to launch: every kernel in the formats and sizes that models have, or a choice of them."""
    shared = SHARED_MEMORY[capability]
    half, float8 = torch.bfloat16, [FLOAT8] if capability >= 89 else []
    attention = [(half, half, 128, 2, False), (half, half, 128, 2, True), (half, half, 256, 8, False)]
    attention += [(torch.float16, torch.float16, 80, 7, False), (torch.float32, torch.float32, 128, 1, False)]
    attention += [(half, kv, 128, 2, False) for kv in float8]
    elementwise = [(half, float8[0] if float8 else half, 1024, 128)]
    kinds = ("int8", "int4", "w8a8")
    products = [(kind, half, rows, False, splits) for kind in kinds for rows, splits in ((1, 132), (200, 1))]
    products += [("int8", torch.float32, 200, True, 1)]
    vocabularies = [151_936]
    if full:
        others = (torch.float16, torch.float32)
        caches, windows = (half, *float8), (False, True)
        sizes = [(head_dim, 4) for head_dim in (16, 32, 64, 80, 96, 112, 128, 160, 192, 256)]
        sizes += [(128, group) for group in (1, 5, 7, 8, 16, 32)]
        attention = [(half, kv, *size, window) for kv in caches for size in sizes for window in windows]
        attention += [
            (dtype, dtype, size, 2, window) for dtype in others for size in (64, 128, 256) for window in windows
        ]
        elementwise = [
            (half, kv, hidden, head_dim)
            for kv in caches
            for hidden, head_dim in ((512, 32), (1024, 128), (1536, 96), (2560, 80), (4096, 64), (8192, 256))
        ]
        elementwise += [(dtype, dtype, 1024, 128) for dtype in others]
        products = [
            (kind, dtype, rows, rows == 1, splits)
            for kind in kinds
            for dtype, counts in ((half, (1, 32, 64, 200)), *((other, (1, 200)) for other in others))
            for rows in counts
            for splits in (132, 1)
        ]
        vocabularies = [32_000, 128_256, 151_936, 262_144]
    for case in attention:
        yield f"attention {case}", partial(_attention, shared, *case)
    for case in elementwise:
        yield f"elementwise {case}", partial(_elementwise, *case)
    for kind, *case in products:
        yield f"product {kind, *case}", partial(_products, kind, capability, *case)
    for vocab_size in vocabularies:
        yield f"sampling from {vocab_size}", partial(_sampling, vocab_size)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", nargs="+", type=int, choices=SHARED_MEMORY, help="90 for 9.0")
    parser.add_argument(
        "--full", action="store_true", help="all sizes and formats; what fails is told, and all goes on"
    )
    args = parser.parse_args()
    failures = 0
    for capability in args.capability:
        compiler, told = Compiler(capability), 0
        for name, work in selected(capability, args.full):
            try:
                work()
            except Exception as error:
                if not args.full:
                    raise
                failures += 1
                print(f"{capability}: {name}: {type(error).__name__}: {str(error)[:400]}", file=sys.stderr, flush=True)
            for kernel in compiler.found[told:]:
                print(json.dumps({"capability": capability, **kernel}), flush=True)
            told = len(compiler.found)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
