"""Where the tests of the Triton kernels run: under Triton's interpreter on the CPU, or on a GPU.

``NANOVLLM_TEST_DEVICE=cuda pytest tests/test_cuda_*.py`` runs them on the GPU. The interpreter's products are wrong in
bfloat16, so that dtype is for the GPU alone.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("NANOVLLM_TEST_DEVICE", "cpu")
ON_GPU = DEVICE != "cpu"
HALF_DTYPES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]
if not ON_GPU:  # read when triton is imported, and again when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"


def _try_interpreter() -> None:
    """Skip the module that imports this one where Triton's interpreter does not go with the installed numpy.

    Older interpreters convert arrays of one number with ``int``, which numpy refuses since 2.4.
    """
    triton = pytest.importorskip("triton")
    tl = triton.language

    @triton.jit
    def count(out, n):  # type: ignore[no-untyped-def]
        total = 0
        for number in range(0, n):
            total += number
        tl.store(out, total)

    try:
        count[(1,)](torch.zeros(1, dtype=torch.int32), 3)
    except Exception as error:
        reason = f"Triton {triton.__version__}'s interpreter does not work here: {error}"
        pytest.skip(reason, allow_module_level=True)


if not ON_GPU:
    _try_interpreter()
