"""What stands for ``nanovllm/ops/npu/npu_ops.py`` where there is no NPU: the same functions in plain torch.

They insist on what the operators' documentation asks for and no NPU would complain about: contiguous inputs, dtypes,
masks in shape, lengths that fit. ``calls`` counts them, as an NPU would launch them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from nanovllm.ops import reference

MASK = 2048


class Substitutes:
    """The functions of ``npu_ops``; ``calls`` counts them by name."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        self.calls["rms_norm"] += 1
        assert x.dtype == weight.dtype and x.shape[-1:] == weight.shape
        return reference.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        self.calls["add_rms_norm"] += 1
        assert x.shape == residual.shape and x.dtype == residual.dtype == weight.dtype
        return reference.add_rms_norm(x, residual, weight, eps)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        self.calls["silu_and_mul"] += 1
        return reference.silu_and_mul(x)

    def grouped_linear(self, x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        self.calls["grouped_linear"] += 1
        assert x.dim() == 2 and x.is_contiguous() and x.dtype in (torch.float16, torch.bfloat16)
        assert all(w.dtype == x.dtype and w.shape[1] == x.shape[1] < 65536 and w.is_contiguous() for w in weights)
        return [x @ weight.t() for weight in weights]

    def int8_linear(self, x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
        self.calls["int8_linear"] += 1
        assert x.dtype in (torch.float16, torch.bfloat16) and values.dtype == torch.int8 and scales.dtype == x.dtype
        assert scales.shape == values.shape[:1] and max(values.shape) <= 65535 and x.numel()
        return (x.float() @ (values.float() * scales.float()[:, None]).T).to(x.dtype)

    def top_k_top_p(self, logits: Tensor, p: Tensor, k: Tensor | None) -> Tensor:
        self.calls["top_k_top_p"] += 1
        assert logits.dtype == p.dtype == torch.float32 and p.shape == logits.shape[:1] and 0 <= p.min() <= p.max() <= 1
        values, order = logits.sort(dim=-1, stable=True)
        if k is not None:
            assert k.dtype == torch.int32 and k.min() >= 1 and k.max() <= min(1024, logits.shape[1])
            values = values.masked_fill(values < values.gather(1, logits.shape[1] - k[:, None].long()), -torch.inf)
        hidden = values.softmax(-1).cumsum(-1) <= 1 - p[:, None]
        hidden[:, -1] = False
        return torch.empty_like(values).scatter_(1, order, values.masked_fill(hidden, -torch.inf))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        self.calls["rotate"] += 1
        tokens, _, size = x.shape
        assert cos.shape == sin.shape == (tokens, 1, size) and size % 2 == 0 and size < 896
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def rotate_both(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        self.calls["rotate_both"] += 1
        assert q.is_contiguous() and k.is_contiguous() and q.shape[2] in (64, 128)
        assert q.dtype == k.dtype == cos.dtype == sin.dtype
        for x in (q, k):
            first, second = x.chunk(2, -1)
            x.copy_(x * cos + torch.cat((-second, first), -1) * sin)
        return q, k

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        self.calls["write_kv"] += 1
        assert all(x.is_contiguous() for x in (k, v, k_cache, v_cache, slots))
        assert slots.unique().numel() == slots.numel(), "slots must differ"
        reference.write_kv(k, v, k_cache, v_cache, slots.long())

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layout: str,
        mask: Tensor | None,
        window: int | None,
        query_lengths: list[int] | None,
        kv_lengths: list[int],
        block_table: Tensor,
        kv_heads: int,
        block_size: int,
        scale: float,
    ) -> Tensor:
        self.calls["attention"] += 1
        assert all(x.is_contiguous() for x in (q, k, v, block_table)) and block_table.dtype == torch.int32
        assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
        assert k.shape == v.shape and k.shape[1] == block_size and k.dim() == 3
        head_dim = q.shape[-1]
        assert k.shape[2] == kv_heads * head_dim
        batch = len(kv_lengths)
        assert len(block_table) == batch and min(kv_lengths) > 0
        assert max(kv_lengths) <= block_table.shape[1] * block_size
        if layout == "TND":
            assert head_dim == 128 and block_size % 16 == 0 and q.dim() == 3
            assert query_lengths is not None and len(query_lengths) == batch and query_lengths[-1] == q.shape[0]
            lengths = [end - start for start, end in zip([0, *query_lengths], query_lengths, strict=False)]
        else:
            assert layout == "BSND" and head_dim % 16 == 0 and q.dim() == 4 and q.shape[0] == batch
            assert block_size % 128 == 0 and q.shape[2] * head_dim < 65535
            lengths = query_lengths or [q.shape[1]] * batch
            assert lengths == [q.shape[1]] * batch
            if q.shape[1] == 1:
                assert window is None, "a single query ignores the window"
        if mask is None:
            assert all(length == 1 for length in lengths), "without a mask every key is seen"
        else:
            assert mask.shape == (MASK, MASK) and mask.dtype == torch.bool
            assert mask[0, 1] and not mask[1, 0] and not mask[0, 0]
        flat = q.reshape(-1, *q.shape[-2:])
        out, start = torch.empty_like(flat), 0
        for row, (count, length) in enumerate(zip(lengths, kv_lengths, strict=True)):
            blocks = block_table[row, : -(-length // block_size)].long()
            keys, values = (x[blocks].reshape(-1, kv_heads, head_dim)[:length] for x in (k, v))
            out[start : start + count] = attend(flat[start : start + count], keys, values, scale, window)
            start += count
        return out.view(q.shape)

    # ---- 310P ------------------------------------------------------------------------------------------------------

    def to_tiles(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 16 and x.dtype == torch.float16
        return x

    def write_kv_tiles(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        self.calls["write_kv_tiles"] += 1
        assert slots.dtype == torch.int32 and k.is_contiguous() and v.is_contiguous()
        block_size = k_cache.shape[2]
        for x, cache in ((k, k_cache), (v, v_cache)):
            tiles = x.reshape(x.shape[0], -1, 16)  # [T, Hk * D / 16, 16]
            cache[slots.long() // block_size, :, slots.long() % block_size] = tiles

    def decode_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, lengths: Tensor, kv_heads: int, scale: float
    ) -> Tensor:
        self.calls["decode_attention"] += 1
        assert lengths.dtype == table.dtype == torch.int32 and len(lengths) == len(table) == len(q)
        return self._tiles(q, k_cache, v_cache, table, lengths.tolist(), [1] * len(q), kv_heads, scale)

    def chunk_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        table: Tensor,
        lengths: Tensor,
        query_lengths: Tensor,
        mask: Tensor,
        kv_heads: int,
        scale: float,
    ) -> Tensor:
        self.calls["chunk_attention"] += 1
        assert lengths.dtype == query_lengths.dtype == table.dtype == torch.int32 and query_lengths.device.type == "cpu"
        assert mask.shape == (MASK, MASK) and mask.dtype == q.dtype and mask[0, 1] < -1000 and mask[1, 1] == 0
        return self._tiles(q, k_cache, v_cache, table, lengths.tolist(), query_lengths.tolist(), kv_heads, scale)

    def masked_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        table: Tensor,
        lengths: Tensor,
        query_lengths: Tensor,
        mask: Tensor,
        kv_heads: int,
        scale: float,
    ) -> Tensor:
        self.calls["masked_attention"] += 1
        assert lengths.dtype == query_lengths.dtype == table.dtype == torch.int32 and query_lengths.device.type == "cpu"
        assert mask.dim() == 4 and mask.shape[0] == 1 and mask.shape[3] == 16 and mask.dtype == q.dtype
        square = mask[0].transpose(0, 1).reshape(mask.shape[2], -1)
        assert len(square) % 16 == 0 and 0 <= len(square) - len(q) < 16 and square.shape[1] % 16 == 0
        out, start = torch.empty_like(q), 0
        for row, (count, length) in enumerate(zip(query_lengths.tolist(), lengths.tolist(), strict=True)):
            keys, values = (self._row(cache, table[row], length, kv_heads) for cache in (k_cache, v_cache))
            part, group = slice(start, start + count), q.shape[1] // kv_heads
            keys, values = (x.float().repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values))
            scores = q[part].float().transpose(0, 1) @ keys.transpose(1, 2) * scale + square[part, :length].float()
            out[part] = (scores.softmax(-1) @ values).transpose(0, 1).to(q.dtype)
            start += count
        return out

    @staticmethod
    def _row(cache: Tensor, blocks: Tensor, length: int, kv_heads: int) -> Tensor:
        """The keys or values [length, Hk, D] of a row out of tiles."""
        found = cache[blocks[: -(-length // cache.shape[2])].long()].permute(0, 2, 1, 3)
        return found.reshape(-1, kv_heads, cache.shape[1] * 16 // kv_heads)[:length]

    def prompt_attention(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, mask: Tensor, kv_heads: int, scale: float
    ) -> Tensor:
        self.calls["prompt_attention"] += 1
        assert len(q) == len(k) == len(v) == int(lengths.sum()) and len(q) % 16 == 0 and k.shape[1] == kv_heads
        assert lengths.dtype == torch.int32 and lengths.device.type == "cpu" and mask.dtype == q.dtype == torch.float16
        assert all(x.is_contiguous() for x in (q, k, v, mask))
        size = mask.shape[2]
        assert mask.shape == (1, size // 16, size, 16) and 0 <= size - int(lengths.max()) < 16
        square = mask[0].transpose(0, 1).reshape(size, size)
        assert torch.equal(square < -1000, torch.ones(size, size).triu(1).bool())
        parts = zip(*(x.split(lengths.tolist()) for x in (q, k, v)), strict=True)
        return torch.cat([attend(*part, scale, None) for part in parts])

    def _tiles(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        table: Tensor,
        lengths: list[int],
        counts: list[int],
        kv_heads: int,
        scale: float,
    ) -> Tensor:
        assert q.dtype == torch.float16 and q.is_contiguous() and q.shape[2] % 16 == 0
        out, start = torch.empty_like(q), 0
        for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            keys, values = (self._row(cache, table[row], length, kv_heads) for cache in (k_cache, v_cache))
            out[start : start + count] = attend(q[start : start + count], keys, values, scale, None)
            start += count
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Causal attention of the last queries of a row: q [S, H, D], k, v [L, Hk, D] -> [S, H, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    distance = torch.arange(k.shape[1])[None, :] - torch.arange(k.shape[1] - len(q), k.shape[1])[:, None]
    hidden = distance > 0
    if window is not None:
        hidden = hidden | (distance <= -window)
    scores = (q.float().transpose(0, 1) @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).to(q.dtype)
