"""Lower the fused operator with triton-ascend as far as that goes without CANN: ``python tests/ascend_lower.py SITE``.

SITE is a folder of its own for triton-ascend, which owns the name ``triton`` and must not meet another one; `install`
fills it. Prints a JSON list: per shape and dtype the mix mode ("aiv": vector cores alone), how many loads and stores go
element by element, and the bytes of the largest tensor in a core's own memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("triton-ascend==3.2.0", "pybind11")
SITE = ROOT / "build" / "triton-ascend-3.2.0"
WIDTH = {"f32": 4, "f16": 2, "bf16": 2, "i64": 8, "i32": 4, "i1": 1, "i8": 1}
TRITON_NAMES = {"bf16": "*bf16", "fp16": "*fp16"}
SHAPES = {  # heads, KV heads, head_dim, norms
    "Qwen3-0.6B": (16, 8, 128, True),
    "Qwen3-32B": (64, 8, 128, True),
    "Qwen2.5-0.5B": (14, 2, 64, False),
}


def install() -> str | None:
    """Make `SITE` (54 MB from PyPI, once); why that is not possible, or None."""
    if SITE.is_dir():
        return None
    if os.environ.get("NANOVLLM_NPU_DOWNLOAD", "1") == "0":
        return f"no triton-ascend in {SITE}, and NANOVLLM_NPU_DOWNLOAD=0 forbids to download it"
    partial = SITE.with_suffix(f".{os.getpid()}")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--retries", "1", "--target", str(partial)]
    done = subprocess.run([*command, *PACKAGES], capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        shutil.rmtree(partial, ignore_errors=True)
        return f"triton-ascend could not be installed: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}"
    if not SITE.exists():
        partial.rename(SITE)
    return None


def lower(site: str) -> list[dict[str, Any]]:
    """Lower every shape in both dtypes."""
    sys.path.insert(0, site)
    sys.path.insert(1, str(ROOT))
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
