"""Where the tests of the Triton kernels run: under Triton's interpreter on the CPU, or on a GPU.

``NANOVLLM_TEST_DEVICE=cuda pytest tests/test_cuda_*.py`` runs them on the GPU. The interpreter's products are wrong in
bfloat16, so that dtype is for the GPU alone.
"""

from __future__ import annotations

import os

import torch

DEVICE = os.environ.get("NANOVLLM_TEST_DEVICE", "cpu")
ON_GPU = DEVICE != "cpu"
HALF_DTYPES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]
if not ON_GPU:  # read when triton is imported, and again when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"
