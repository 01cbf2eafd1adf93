"""Lower the fused operator with triton-ascend as far as that goes without CANN: ``python tests/ascend_lower.py SITE``.

SITE is a folder of its own for triton-ascend, which owns the name ``triton`` and must not meet another one:

    pip install --target SITE --no-deps triton-ascend==3.2.0
    pip install --target SITE pybind11 attrs decorator psutil scipy pyyaml

Prints a JSON list: per shape and dtype the mix mode ("aiv": vector cores alone), how many loads and stores go element
by element, and the bytes of the largest tensor in a core's own memory.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

WIDTH = {"f32": 4, "f16": 2, "bf16": 2, "i64": 8, "i32": 4, "i1": 1, "i8": 1}
TRITON_NAMES = {"bf16": "*bf16", "fp16": "*fp16"}
SHAPES = {  # heads, KV heads, head_dim, norms
    "Qwen3-0.6B": (16, 8, 128, True),
    "Qwen3-32B": (64, 8, 128, True),
    "Qwen2.5-0.5B": (14, 2, 64, False),
}


def lower(site: str) -> list[dict[str, Any]]:
    """Lower every shape in both dtypes."""
    sys.path.insert(0, site)
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
    import triton
    from triton._C.libtriton import ir
    from triton.backends.ascend import compiler as ascend
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not str(triton.__file__).startswith(str(Path(site).resolve())):
        raise SystemExit(f"triton is {triton.__file__}, not the one in {site}")
    from nanovllm.ops.npu.fused import tiles
    from nanovllm.ops.npu.fused_kernel import norm_rotate_write_kernel

    results = []
    backend = ascend.AscendBackend(GPUTarget("npu", "Ascend910B2", 0))
    for name, (heads, kv_heads, head_dim, norm) in SHAPES.items():
        for dtype, pointer in TRITON_NAMES.items():
            constants = {"H": heads, "HK": kv_heads, "D": head_dim, "NORM": norm, **tiles(heads, kv_heads, head_dim)}
            names = norm_rotate_write_kernel.arg_names
            signature = dict.fromkeys(names[:9], pointer) | {"slots": "*i64", "tokens": "i32", "eps": "fp32"}
            source = ASTSource(
                norm_rotate_write_kernel, {n: t for n, t in signature.items() if n not in constants}, constants
            )
            options = backend.parse_options({})
            context = ir.context()
            ir.load_dialects(context)
            backend.load_dialects(context)
            module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
            about = dict(options.__dict__)
            ttir = ascend.make_ttir(module, about, options)
            linalg = ascend.ttir_to_linalg(ttir, about, options, named_ops=True)
            results.append({"shape": name, "dtype": dtype, **describe(linalg)})
    return results


def describe(linalg: str) -> dict[str, Any]:
    """What is in the lowered kernel."""
    mode = re.search(r'mix_mode\s*=\s*"(\w+)"', linalg)
    sizes = [
        int(rows or 1) * int(columns) * WIDTH[kind]
        for rows, columns, kind in re.findall(r"tensor<(?:(\d+)x)?(\d+)x(\w+)>", linalg)
        if kind in WIDTH
    ]
    return {
        "mix_mode": mode[1] if mode else None,
        "gathers": len(re.findall(r"DiscreteMemAccess|ExtractedLoadOrStore", linalg)),
        "tile_bytes": max(sizes),
        "lines": linalg.count("\n"),
    }


if __name__ == "__main__":
    print(json.dumps(lower(sys.argv[1])))
