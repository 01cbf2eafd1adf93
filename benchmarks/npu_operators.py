"""Every operator of a device against the reference, for npu_check.py.

The reference computes in float32 on the CPU, from numbers that are rounded to the device's format. What counts is the
largest error, relative to the largest number of the result. An operator that raises is noted, and the next one begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gpu_engine import Setup
from torch import Tensor

from nanovllm.ops import AttentionMetadata, operator_table, reference
from nanovllm.platforms import get_platform

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
Pairs = Iterator[tuple[Tensor, Tensor]]  # ours, the reference's


def operators(setup: Setup) -> dict[str, Any]:
    """The errors by operator; what raised is under "raised"."""
    draw = torch.Generator().manual_seed(0)
    ops = operator_table(setup.device)
    errors: dict[str, float] = {}
    raised: dict[str, str] = {}

    def check(name: str, work: Callable[[], Pairs]) -> None:
        try:
            for ours, theirs in work():
                error = (ours.float().cpu() - theirs).abs().max() / theirs.abs().max()
                errors[name] = float("inf") if error.isnan() else max(errors.get(name, 0.0), error.item())
        except Exception as fault:
            raised[name] = f"{type(fault).__name__}: {fault}"

    for rows in (1, 7, setup.few(300, 20)):
        for name in ("rms_norm", "add_rms_norm", "silu_and_mul", "gelu_and_mul", "linear", "linear_parts"):
            check(name, lambda name=name, rows=rows: _elementwise(name, Inputs(setup, draw), ops, rows))
    check("keep_likeliest", lambda: _sampling(Inputs(setup, draw), ops))
    if setup.device == "npu":
        check("linear, weights in 8 bits", lambda: _int8(Inputs(setup, draw)))
    for heads, kv_heads, size in ((16, 8, 128), (8, 2, 64)):
        for norms in (True, False):
            batch = Batch.of(Inputs(setup, draw), heads, kv_heads, size, norms)
            for name in ("norm_rotate_write", "paged_attention", "copy_blocks"):
                check(f"{name}, heads of {size}", lambda name=name, batch=batch: _paged(name, batch, ops, setup))
    limit = TOLERANCE[setup.dtype]
    passed = not raised and all(error < limit for error in errors.values())
    return {"passed": passed, "raised": raised, "limit": limit, **errors}


@dataclass
class Inputs:
    """Random numbers in the device's format, and the same in float32 on the CPU."""

    setup: Setup
    draw: torch.Generator

    def __call__(self, *shape: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        rounded = (torch.randn(shape, generator=self.draw) * scale).to(self.setup.dtype)
        return rounded.to(self.setup.device), rounded.float()


def _elementwise(name: str, inputs: Inputs, ops: Any, rows: int) -> Pairs:
    (x, x32), (r, r32), (w, w32) = inputs(rows, 1024), inputs(rows, 1024), inputs(1024)
    if name == "rms_norm":
        yield ops.rms_norm(x, w, 1e-6), reference.rms_norm(x32, w32, 1e-6)
    elif name == "add_rms_norm":
        yield from zip(ops.add_rms_norm(x, r, w, 1e-6), reference.add_rms_norm(x32, r32, w32, 1e-6), strict=True)
    elif name == "silu_and_mul":
        yield ops.silu_and_mul(x), reference.silu_and_mul(x32)
    elif name == "gelu_and_mul":
        yield ops.gelu_and_mul(x, "tanh"), reference.gelu_and_mul(x32, "tanh")
    else:
        weight, weight32 = inputs(384, 1024, scale=0.05)
        theirs = reference.linear(x32, weight32, None)
        if name == "linear":
            yield ops.linear(x, ops.pack_linear(weight), None), theirs
        elif ops.linear_parts is not None:
            widths = [192, 128, 64]
            parts = ops.linear_parts(x, ops.pack_linear(weight), None, widths)
            yield from zip(parts, theirs.split(widths, 1), strict=True)


def _sampling(inputs: Inputs, ops: Any) -> Pairs:
    """Which tokens may be drawn: the sum of their probabilities, and of the others'."""
    logits = torch.randn(6, 4000, generator=inputs.draw) * 2
    top_k = np.array([0, 50, 0, 2000, 1, 7], np.int64)
    top_p, min_p = np.array([[0.9, 1, 1, 0.8, 1, 0.5], [0, 0, 0.05, 0, 0, 0.01]], np.float32)
    shares = logits.softmax(-1)
    kept = ops.keep_likeliest(logits.to(inputs.setup.device), top_k, top_p, min_p).isfinite().cpu()
    wanted = reference.keep_likeliest(logits, top_k, top_p, min_p).isfinite()
    for mine, theirs in ((kept, wanted), (~kept, ~wanted)):
        yield (shares * mine).sum(-1), (shares * theirs).sum(-1)


def _int8(inputs: Inputs) -> Pairs:
    """Against the product with the weights as they are after rounding."""
    ops = operator_table("npu", None, "int8")
    (x, x32), (weight, _) = inputs(7, 1024), inputs(384, 1024, scale=0.05)
    packed = ops.pack_linear(weight)
    rounded = ops.weight_rows(packed, torch.arange(384, device=x.device)).float().cpu()
    yield ops.linear(x, packed, None), reference.linear(x32, rounded, None)


@dataclass
class Batch:
    """Decodes, a chunk behind history and whole prompts, in blocks that lie anywhere.

    Attributes:
        qkv: q | k | v of every token of every row, ours and the reference's; so are the weights.
        table: block table int32 [rows, width].
        slots: of all tokens; ``last``: which of them are queries.
        spare: a block that nobody uses.
    """

    block_size: int
    kv_heads: int
    queries: list[int]
    lengths: list[int]
    qkv: tuple[Tensor, Tensor]
    weights: list[tuple[Tensor | None, Tensor | None]]
    cos: Tensor
    sin: Tensor
    table: Tensor
    slots: Tensor
    last: Tensor
    spare: int
    starts: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, inputs: Inputs, heads: int, kv_heads: int, size: int, norms: bool) -> Batch:
        setup, draw = inputs.setup, inputs.draw
        block: int = get_platform(setup.device).block_size
        rows = [(1, 1), (1, 2 * block + 3), (1, block), (40, block + 70), (20, 20)]  # (queries, length)
        if not setup.quick:
            rows += [(300, 300), (129, 4 * block + 5)]
        queries, lengths = [count for count, _ in rows], [length for _, length in rows]
        blocks = [-(-length // block) for length in lengths]
        order = (torch.randperm(sum(blocks), generator=draw) + 1).int().split(blocks)
        table = torch.zeros(len(rows), max(blocks), dtype=torch.int32)
        slots, last, total = [], [], 0
        for row, own in enumerate(order):
            table[row, : len(own)] = own
            position = torch.arange(lengths[row])
            slots.append(own.long()[position // block] * block + position % block)
            total += lengths[row]
            last.append(torch.arange(total - queries[row], total))
        angles = torch.rand(total, 1, size // 2, generator=draw) * 6
        return cls(
            block, kv_heads, queries, lengths,
            qkv=inputs(total, heads + 2 * kv_heads, size),
            weights=[inputs(size) if norms else (None, None) for _ in range(2)],
            cos=torch.cat([angles.cos(), angles.cos()], -1).to(setup.dtype),
            sin=torch.cat([-angles.sin(), angles.sin()], -1).to(setup.dtype),
            table=table, slots=torch.cat(slots), last=torch.cat(last), spare=sum(blocks) + 1,
            starts=[0, *torch.tensor(queries).cumsum(0).tolist()],
        )  # fmt: skip

    def write(self, ops: Any, which: int, device: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """q of all tokens, and caches with their keys and values; ``which``: 0 for ours, 1 for the reference's."""
        qkv = self.qkv[which]
        new = getattr(ops, "new_cache", None) or _plain_cache
        shape = (self.spare + 1, self.block_size, self.kv_heads, qkv.shape[2], dtype, torch.device(device))
        caches = [new(*shape) for _ in range(2)]
        turn = self.cos.to(device, dtype), self.sin.to(device, dtype)
        norms = [weight[which] for weight in self.weights]
        q = ops.norm_rotate_write(qkv, *norms, 1e-6, *turn, *caches, self.slots.to(device))
        return q, caches

    def attend(self, ops: Any, q: Tensor, caches: list[Tensor], table: Tensor) -> Tensor:
        """Attention of the rows' last tokens. Caches are read in no other way: their layout is the device's affair."""
        device, last = q.device, self.last.to(q.device)
        meta = AttentionMetadata(
            self.starts, self.lengths, 3, max(self.queries), max(self.lengths), table.to(device),
            self.slots[self.last].to(device), self.block_size,
        )  # fmt: skip
        ops.prepare_attention(meta, [None], q.dtype)
        return ops.paged_attention(q[last].contiguous(), *caches, meta, q.shape[2] ** -0.5, None)


def _paged(name: str, batch: Batch, ops: Any, setup: Setup) -> Pairs:
    """One of the operators on the cache; ``copy_blocks`` by attention to a row whose first block is a copy."""
    found = []
    for which, (table_of, device, dtype) in enumerate(
        ((ops, setup.device, setup.dtype), (reference, "cpu", torch.float32))
    ):
        q, caches = batch.write(table_of, which, device, dtype)
        if name == "norm_rotate_write":
            found.append(q)
            continue
        table = batch.table
        if name == "copy_blocks":
            table_of.copy_blocks([(caches[0], caches[1])], [int(table[1, 0])], [batch.spare])
            table = table.clone()
            table[1, 0] = batch.spare
        found.append(batch.attend(table_of, q, caches, table))
    yield found[0], found[1]


def _plain_cache(
    num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.zeros(num_blocks, block_size, kv_heads, head_dim, dtype=dtype, device=device)
