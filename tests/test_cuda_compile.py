"""The Triton kernels compile to machine code of GPUs that are not here: what the interpreter cannot tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = {
    "_rms_norm", "_gated", "_norm_rotate_write", "_copy_blocks", "decode_kernel", "merge_kernel", "tile_kernel",
    "_product", "_quantize_rows", "_summarise", "_choose",
    "_penalise",
}  # fmt: skip
KIB = 1 << 10


@pytest.mark.parametrize(("capability", "shared_memory"), [(86, 99 * KIB), (90, 227 * KIB), (100, 227 * KIB)])
def test_every_kernel_compiles_and_fits(capability: int, shared_memory: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    script = Path(__file__).with_name("cuda_compile.py")
    done = subprocess.run(
        [sys.executable, str(script), str(capability)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in compiled} == KERNELS
    # The number of rows changes from step to step: nothing is compiled once more for another.
    found = [(kernel["kernel"], kernel["dtypes"], kernel["constants"]) for kernel in compiled]
    assert [each for each in found if found.count(each) > 1] == []
    for kernel in compiled:
        assert kernel["bytes"] and kernel["shared"] <= shared_memory, kernel
        in_float32 = kernel["dtypes"][0] == "float32"  # no matrix units: who wants speed does not use it
        if kernel["kernel"] in ("decode_kernel", "tile_kernel", "_product") and not in_float32:
            assert kernel["tensor cores"] and kernel["loads ahead"], kernel
            # Longer queries take all 255 registers on Ampere, and a few more.
            assert kernel["spilled"] <= (160 if kernel["kernel"] == "tile_kernel" else 0), kernel
