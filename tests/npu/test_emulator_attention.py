"""FusedInferAttentionScore and the paged cache against goldens written here, and every documented constraint."""

import math

import numpy as np
import pytest
import torch
from on_npu import DEVICE, npu, randn, refused, torch_npu

pytestmark = pytest.mark.emulated
BLOCK = 128


def golden(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float, window: int | None = None
) -> np.ndarray:
    """Causal attention of one sequence, query by query: [q, H, D], [k, G, D] -> [q, H, D]."""
    queries, heads, _ = query.shape
    keys, groups, _ = key.shape
    out = np.zeros((queries, heads, value.shape[2]))
    for q in range(queries):
        last = keys - queries + q
        first = 0 if window is None else max(0, last - window)
        for h in range(heads):
            g = h // (heads // groups)
            scores = key[first : last + 1, g] @ query[q, h] * scale
            weights = np.exp(scores - scores.max())
            out[q, h] = weights / weights.sum() @ value[first : last + 1, g]
    return out


class Paged:
    """Sequences of ``lengths`` keys in a paged cache, their blocks scattered."""

    def __init__(self, lengths: list[int], groups: int, dim: int, dtype: torch.dtype) -> None:
        columns = max(-(-length // BLOCK) for length in lengths)
        count = columns * len(lengths) + 3
        order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
        self.table = order[: columns * len(lengths)].view(len(lengths), columns).to(torch.int32)
        self.keys = randn(count, BLOCK, groups, dim, dtype=dtype, seed=1)
        self.values = randn(count, BLOCK, groups, dim, dtype=dtype, seed=2)
        self.lengths, self.groups, self.dim = lengths, groups, dim

    def sequence(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for cache in (self.keys, self.values):
            rows = cache[self.table[i].long()].reshape(-1, self.groups, self.dim)[: self.lengths[i]]
            found.append(rows.double().numpy())
        return found[0], found[1]

    def flat(self, cache: torch.Tensor) -> torch.Tensor:
        return npu(cache.reshape(cache.shape[0], BLOCK, -1))


def cumulative(lengths: list[int]) -> list[int]:
    return np.cumsum(lengths).tolist()


def mask() -> torch.Tensor:
    return torch.ones(2048, 2048, dtype=torch.int8, device=DEVICE).triu(1)


def paged_call(paged: Paged, query: torch.Tensor, queries: list[int], /, **changes: object) -> torch.Tensor:
    arguments = dict(
        query=npu(query), key=paged.flat(paged.keys), value=paged.flat(paged.values), atten_mask=mask(),
        block_table=npu(paged.table), actual_seq_lengths=cumulative(queries), actual_seq_lengths_kv=paged.lengths,
        num_heads=query.shape[1], num_key_value_heads=paged.groups, scale=paged.dim**-0.5, input_layout="TND",
        sparse_mode=3, block_size=BLOCK,
    )  # fmt: skip
    arguments.update(changes)
    return torch_npu.npu_fused_infer_attention_score(**arguments)[0].cpu()


def expected(paged: Paged, query: torch.Tensor, queries: list[int], window: int | None = None) -> torch.Tensor:
    parts, begin = [], 0
    for i, count in enumerate(queries):
        keys, values = paged.sequence(i)
        part = query[begin : begin + count].double().numpy()
        parts.append(golden(part, keys, values, paged.dim**-0.5, window))
        begin += count
    return torch.from_numpy(np.concatenate(parts))


def assert_close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = 2e-3 if dtype == torch.float16 else 1.6e-2
    torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads, groups", [(2, 2), (6, 2), (4, 1)])
def test_prefill_chunk_and_decode_in_one_call(dtype: torch.dtype, heads: int, groups: int) -> None:
    queries, keys = [7, 20, 1, 1], [7, 150, 129, 1]
    paged = Paged(keys, groups, 128, dtype)
    query = randn(sum(queries), heads, 128, dtype=dtype)
    assert_close(paged_call(paged, query, queries), expected(paged, query, queries), dtype)


def test_a_sliding_window_is_mode_4() -> None:
    queries, keys = [5, 1], [200, 140]
    paged = Paged(keys, 1, 128, torch.float16)
    query = randn(6, 2, 128, dtype=torch.float16)
    found = paged_call(paged, query, queries, sparse_mode=4, pre_tokens=64, next_tokens=0)
    assert_close(found, expected(paged, query, queries, window=64), torch.float16)


def test_without_a_block_table_key_lengths_are_cumulative() -> None:
    lengths = [5, 9]
    query, key, value = (randn(14, 2, 128, dtype=torch.float16, seed=seed) for seed in range(3))
    found = torch_npu.npu_fused_infer_attention_score(
        npu(query), npu(key), npu(value), atten_mask=mask(), actual_seq_lengths=cumulative(lengths),
        actual_seq_lengths_kv=cumulative(lengths), num_heads=2, scale=128**-0.5, input_layout="TND", sparse_mode=3,
    )[0]  # fmt: skip
    parts = [golden(*(x[a:b].double().numpy() for x in (query, key, value)), 128**-0.5) for a, b in ((0, 5), (5, 14))]
    assert_close(found.cpu(), torch.from_numpy(np.concatenate(parts)), torch.float16)


@pytest.mark.parametrize("dim", [16, 64, 96, 256])
def test_decoding_in_bsnd_takes_other_head_dims(dim: int) -> None:
    paged = Paged([130, 7, 256], 2, dim, torch.float16)
    query = randn(3, 4, dim, dtype=torch.float16)
    found = paged_call(
        paged, query, [1, 1, 1], query=npu(query[:, None]), input_layout="BSND", sparse_mode=0, atten_mask=None,
        actual_seq_lengths=None,
    )  # fmt: skip
    assert_close(found[:, 0], expected(paged, query, [1, 1, 1]), torch.float16)


def test_version_2_takes_the_same_and_a_sink() -> None:
    paged = Paged([40, 3], 2, 128, torch.bfloat16)
    query = randn(4, 2, 128, dtype=torch.bfloat16)
    arguments = dict(
        query=npu(query), key=paged.flat(paged.keys), value=paged.flat(paged.values), atten_mask=mask(),
        block_table=npu(paged.table), actual_seq_qlen=[3, 4], actual_seq_kvlen=[40, 3], num_query_heads=2,
        num_key_value_heads=2, softmax_scale=128**-0.5, input_layout="TND", sparse_mode=3, block_size=BLOCK,
    )  # fmt: skip
    plain = torch_npu.npu_fused_infer_attention_score_v2(**arguments)[0].cpu()
    assert_close(plain, expected(paged, query, [3, 1]), torch.bfloat16)
    sink = torch.tensor([0.5, -1.0], dtype=torch.bfloat16)
    found = torch_npu.npu_fused_infer_attention_score_v2(**arguments, learnable_sink=npu(sink))[0].cpu()
    keys, values = paged.sequence(1)
    for head in range(2):
        scores = keys[:, head] @ query[3, head].double().numpy() * 128**-0.5
        weights = np.exp(scores) / (np.exp(scores).sum() + math.exp(sink[head].item()))
        assert_close(found[3, head], torch.from_numpy(weights @ values[:, head]), torch.bfloat16)


# ---- constraints: each is documented, each raises -----------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(actual_seq_lengths=[3, 1]), "actual_seq_lengths must be cumulative"),
        (dict(actual_seq_lengths=[3, 5]), "end at the 4 tokens"),
        (dict(actual_seq_lengths_kv=[40, 300]), "300 keys need 3 blocks, block_table has 1 columns"),
        (dict(actual_seq_lengths_kv=[2, 3]), "a sequence has 3 queries but 2 keys"),
        (dict(actual_seq_lengths_kv=[40]), "2 query and 1 key lengths"),
        (dict(atten_mask=None), "needs the mask of 2048 x 2048"),
        (dict(block_size=64), "is not .blocks, block_size 64"),
        (dict(num_key_value_heads=3), "2 heads over 3 KV heads"),
        (dict(sparse_mode=0), "sparse_mode 0 without a mask"),
        (dict(input_layout="BSND"), ""),
    ],
)
def test_a_violated_constraint_is_an_error(changes: dict, message: str) -> None:
    paged = Paged([40, 3], 2, 128, torch.float16)
    query = randn(4, 2, 128, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        paged_call(paged, query, [3, 1], **changes)


def test_head_dims_outside_the_packed_layouts_rule_are_refused() -> None:
    paged = Paged([40, 3], 2, 64, torch.float16)
    with refused("with TND .* head_dim must be 128 or 192, not 64"):
        paged_call(paged, randn(4, 2, 64, dtype=torch.float16), [3, 1])


def test_float32_is_refused() -> None:
    paged = Paged([40, 3], 2, 128, torch.float32)
    with pytest.raises(RuntimeError):
        paged_call(paged, randn(4, 2, 128), [3, 1])


def test_blocks_outside_the_cache_are_the_devices_address_fault() -> None:
    paged = Paged([40, 3], 2, 128, torch.float16)
    paged.table[1, 0] = 1000
    with refused("MTE DDR address out of range: block .1000."):
        paged_call(paged, randn(4, 2, 128, dtype=torch.float16), [3, 1])


def test_a_wrong_mask_is_noticed() -> None:
    paged = Paged([40, 3], 2, 128, torch.float16)
    wrong = torch.ones(2048, 2048, dtype=torch.int8, device=DEVICE).tril()
    with refused("mask's row 0 must hide"):
        paged_call(paged, randn(4, 2, 128, dtype=torch.float16), [3, 1], atten_mask=wrong)


# ---- the cache ----------------------------------------------------------------------------------------------------


def _caches(shape: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=torch.float16, device=DEVICE) for _ in range(2)]


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
def test_tokens_go_to_their_slots(slot_dtype: torch.dtype) -> None:
    key, value = randn(5, 2, 64, dtype=torch.float16), randn(5, 2, 64, dtype=torch.float16, seed=1)
    slots = torch.tensor([130, 0, 383, 7, 128], dtype=slot_dtype)
    keys, values = _caches((3, 128, 2, 64))
    torch_npu.npu_scatter_pa_kv_cache(npu(key), npu(value), keys, values, npu(slots), cache_mode="Norm")
    for new, cache in ((key, keys.cpu()), (value, values.cpu())):
        wanted = torch.zeros(3, 128, 2, 64, dtype=torch.float16)
        for i, slot in enumerate(slots.tolist()):
            wanted[slot // 128, slot % 128] = new[i]
        assert torch.equal(cache, wanted)


def test_the_default_mode_writes_tiles() -> None:
    key = randn(2, 2, 32, dtype=torch.float16)
    keys, values = _caches((3, 4, 128, 16))
    torch_npu.npu_scatter_pa_kv_cache(npu(key), npu(key), keys, values, npu(torch.tensor([3, 129])))
    cache = keys.cpu()
    for i, slot in enumerate((3, 129)):
        flat = key[i].reshape(-1)
        for column in range(64):
            assert cache[slot // 128, column // 16, slot % 128, column % 16] == flat[column]


@pytest.mark.parametrize(
    "slots, message",
    [([0, 384], r"slot \[384\] of a cache of 384"), ([0, -1], r"slot \[-1\]"), ([5, 5], "must be unique")],
)
def test_bad_slots_are_errors(slots: list[int], message: str) -> None:
    key = npu(randn(2, 2, 64, dtype=torch.float16))
    with refused(message):
        caches = _caches((3, 128, 2, 64))
        torch_npu.npu_scatter_pa_kv_cache(key, key, *caches, npu(torch.tensor(slots)), cache_mode="Norm")


def test_the_default_mode_refuses_a_plain_cache() -> None:
    key = npu(randn(2, 2, 64, dtype=torch.float16))
    with refused("PA_NZ"):
        torch_npu.npu_scatter_pa_kv_cache(key, key, *_caches((3, 128, 2, 64)), npu(torch.tensor([0, 1])))
