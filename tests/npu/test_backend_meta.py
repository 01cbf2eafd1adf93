"""The engine's calls on tensors without memory: torch_npu's own kernels for "meta" check arguments and infer outputs.

What they infer is held against the same functions in plain torch. They check little, so that the emulation must, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from npu_substitutes import Substitutes

pytestmark = pytest.mark.emulated
HALF = torch.float16


class Meta:
    """Makes arguments, on the CPU or as tensors without memory."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, *shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=self.device)

    def range(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.arange(count, dtype=dtype, device=self.device)


def _attention(new: Meta, head_dim: int, layout: str) -> tuple[tuple, dict]:
    shape = (3, 4, head_dim) if layout == "TND" else (3, 1, 4, head_dim)
    cache = new(8, 128, 2 * head_dim)
    mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1).to(new.device) if layout == "TND" else None
    return (new(*shape), cache, cache), dict(
        layout=layout, mask=mask, window=None, query_lengths=[1, 2, 3] if layout == "TND" else None,
        kv_lengths=[5, 130, 7], block_table=new(3, 2, dtype=torch.int32), kv_heads=2, block_size=128, scale=0.1,
    )  # fmt: skip


CALLS: dict[str, Callable[[Meta], tuple[tuple, dict]]] = {
    "rms_norm": lambda new: ((new(5, 4, 64), new(64), 1e-6), {}),
    "add_rms_norm": lambda new: ((new(5, 64), new(5, 64), new(64), 1e-6), {}),
    "silu_and_mul": lambda new: ((new(5, 64),), {}),
    "rotate": lambda new: ((new(5, 4, 64), new(5, 1, 64), new(5, 1, 64)), {}),
    "rotate_both": lambda new: ((new(5, 4, 64), new(5, 2, 64), new(5, 1, 64), new(5, 1, 64)), {}),
    "grouped_linear": lambda new: ((new(5, 64), [new(32, 64), new(16, 64), new(16, 64)]), {}),
    "int8_linear": lambda new: ((new(5, 64), new(32, 64, dtype=torch.int8), new(32)), {}),
    "top_k_top_p": lambda new: ((new(2, 9, dtype=torch.float32), new(2, dtype=torch.float32),
                                 new(2, dtype=torch.int32)), {}),
    "write_kv": lambda new: ((new(3, 2, 64), new(3, 2, 64), new(4, 16, 2, 64), new(4, 16, 2, 64),
                              new.range(3, torch.int64)), {}),
    "attention": lambda new: _attention(new, 128, "TND"),
}  # fmt: skip


def outputs(result: Any) -> list[tuple[torch.Size, torch.dtype]]:
    tensors = [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)
    return [(tensor.shape, tensor.dtype) for tensor in tensors]


@pytest.mark.parametrize("name", CALLS)
def test_the_wheel_infers_the_outputs_that_the_engine_expects(name: str) -> None:
    from nanovllm.ops.npu import npu_ops

    arguments, keywords = CALLS[name](Meta("meta"))
    found = getattr(npu_ops, name)(*arguments, **keywords)
    arguments, keywords = CALLS[name](Meta("cpu"))
    assert outputs(found) == outputs(getattr(Substitutes(), name)(*arguments, **keywords))


def test_decodes_of_other_heads_infer_their_outputs() -> None:
    from nanovllm.ops.npu import npu_ops

    arguments, keywords = _attention(Meta("meta"), 64, "BSND")
    assert outputs(npu_ops.attention(*arguments, **keywords)) == [(torch.Size((3, 1, 4, 64)), HALF)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ops, new: ops.attention(*(a := _attention(new, 128, "TND"))[0], **{**a[1], "layout": "XYZ"}), "layout"),
        (lambda ops, new: ops.torch_npu.npu_rms_norm(new(5, 64), new(64), eps=1e-6), "eps"),
        (lambda ops, new: ops.torch_npu.npu_swiglu(new(5, 64), dim=1.5), "dim"),
    ],
)
def test_the_wheel_refuses_what_is_no_argument(call: Any, message: str) -> None:
    from nanovllm.ops.npu import npu_ops

    with pytest.raises(RuntimeError, match=f"(?i){message}"):
        call(npu_ops, Meta("meta"))


def test_the_wheel_has_a_schema_for_what_has_no_such_kernel() -> None:
    """The 310P's operators on the cache (namespace atb), and the cast to tiles."""
    from nanovllm.ops.npu import npu_ops  # noqa: F401

    for name in ("reshape_and_cache", "paged_attention", "paged_attention_splitfuse", "paged_attention_splitfuse_v2",
                 "flash_attention"):  # fmt: skip
        operator = f"atb::_npu_{name}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, "PrivateUse1"), operator
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(operator, "Meta"), operator
