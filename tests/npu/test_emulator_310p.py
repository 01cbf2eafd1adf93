"""The 310P (Atlas 300I Duo): float16 only, tiled caches, operators of its own."""

import numpy as np
import pytest
import torch
from on_npu import DEVICE, npu, randn, refused, torch_npu

pytestmark = pytest.mark.emulated(soc="Ascend310P3")
BLOCK, HEADS, GROUPS, DIM = 128, 4, 2, 64


def tiled(cache: torch.Tensor) -> torch.Tensor:
    """[blocks, block, G, D] as the 310P wants it: column c of a token's G * D values at [c // 16, token, c % 16]."""
    blocks, size = cache.shape[:2]
    return cache.reshape(blocks, size, -1, 16).transpose(1, 2).contiguous()


def golden(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Causal attention of the last queries of a sequence: [q, H, D], [k, G, D] -> [q, H, D]."""
    out = np.zeros(query.shape)
    for q in range(query.shape[0]):
        last = key.shape[0] - query.shape[0] + q
        for h in range(HEADS):
            g = h // (HEADS // GROUPS)
            scores = key[: last + 1, g] @ query[q, h] * DIM**-0.5
            weights = np.exp(scores - scores.max())
            out[q, h] = weights / weights.sum() @ value[: last + 1, g]
    return out


def assert_near(found: torch.Tensor, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found.cpu().double().numpy(), wanted, atol=2e-3, rtol=2e-3)


def added_mask(rows: int, columns: int, shift: int = 0) -> torch.Tensor:
    hidden = torch.ones(rows, columns).triu(1 + shift).bool()
    return torch.zeros(rows, columns, dtype=torch.float16).masked_fill(hidden, float("-inf"))


def test_the_device_says_what_it_is() -> None:
    assert torch.npu.get_device_name(0) == "Ascend310P3"


def test_tokens_are_written_into_tiles() -> None:
    key, value = randn(3, GROUPS, DIM, dtype=torch.float16), randn(3, GROUPS, DIM, dtype=torch.float16, seed=1)
    plain = torch.zeros(2, BLOCK, GROUPS, DIM, dtype=torch.float16)
    keys, values = npu(tiled(plain)), npu(tiled(plain))
    slots = torch.tensor([5, 128, 200], dtype=torch.int32)
    torch_npu._npu_reshape_and_cache(npu(key), npu(value), keys, values, npu(slots))
    for new, cache in ((key, keys), (value, values)):
        wanted = plain.clone()
        wanted.view(-1, GROUPS, DIM)[slots.long()] = new
        assert torch.equal(cache.cpu(), tiled(wanted))


@pytest.mark.parametrize("where", ["cpu", DEVICE])
def test_decoding_reads_tiles(where: str) -> None:
    lengths, table = [130, 7], torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    caches = [randn(4, BLOCK, GROUPS, DIM, dtype=torch.float16, seed=seed) for seed in (1, 2)]
    query = randn(2, HEADS, DIM, dtype=torch.float16)
    out = torch.empty(2, HEADS, DIM, dtype=torch.float16, device=DEVICE)
    torch_npu._npu_paged_attention(
        npu(query), npu(tiled(caches[0])), npu(tiled(caches[1])), GROUPS, HEADS, DIM**-0.5, npu(table),
        torch.tensor(lengths, dtype=torch.int32, device=where), out,
    )  # fmt: skip
    for i, length in enumerate(lengths):
        key, value = (c[table[i].long()].reshape(-1, GROUPS, DIM)[:length].double().numpy() for c in caches)
        assert_near(out[i : i + 1], golden(query[i : i + 1].double().numpy(), key, value))


def test_prefill_takes_packed_sequences_and_a_mask() -> None:
    lengths = torch.tensor([5, 9], dtype=torch.int32)
    query = randn(14, HEADS, DIM, dtype=torch.float16)
    key, value = (randn(14, GROUPS, DIM, dtype=torch.float16, seed=seed) for seed in (1, 2))
    out = torch.empty_like(query, device=DEVICE)
    mask = npu(added_mask(16, 16))
    torch_npu._npu_flash_attention(npu(query), npu(key), npu(value), mask, lengths, DIM**-0.5, HEADS, GROUPS, out)
    for part in (slice(0, 5), slice(5, 14)):
        assert_near(out[part], golden(*(x[part].double().numpy() for x in (query, key, value))))


def test_chunks_take_a_row_of_the_mask_per_query() -> None:
    queries, lengths = [4, 1], [133, 9]
    table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    caches = [randn(4, BLOCK, GROUPS, DIM, dtype=torch.float16, seed=seed) for seed in (1, 2)]
    query = randn(5, HEADS, DIM, dtype=torch.float16)
    rows = [added_mask(count, 144, length - count) for count, length in zip(queries, lengths, strict=True)]
    out = torch.empty_like(query, device=DEVICE)
    torch_npu._npu_paged_attention_splitfuse(
        npu(query), npu(tiled(caches[0])), npu(tiled(caches[1])), npu(table), torch.tensor(lengths, dtype=torch.int32),
        npu(torch.cat(rows)), torch.tensor(queries, dtype=torch.int32), GROUPS, HEADS, DIM**-0.5, out,
    )  # fmt: skip
    begin = 0
    for i, (count, length) in enumerate(zip(queries, lengths, strict=True)):
        part = slice(begin, begin + count)
        key, value = (c[table[i].long()].reshape(-1, GROUPS, DIM)[:length].double().numpy() for c in caches)
        assert_near(out[part], golden(query[part].double().numpy(), key, value))
        begin += count


def test_bfloat16_is_refused() -> None:
    x = npu(randn(3, 64, dtype=torch.bfloat16))
    with refused("Ascend310P3 has no bfloat16"):
        torch_npu.npu_rms_norm(x, x[0].clone(), 1e-6)
    key = npu(randn(3, GROUPS, DIM, dtype=torch.bfloat16))
    cache = npu(tiled(torch.zeros(2, BLOCK, GROUPS, DIM).bfloat16()))
    with pytest.raises(Exception, match="Ascend310P3 has no bfloat16"):
        torch_npu._npu_reshape_and_cache(key, key, cache, cache, npu(torch.arange(3, dtype=torch.int32)))


def test_operators_of_the_larger_cards_are_refused() -> None:
    query = npu(randn(2, 2, 128, dtype=torch.float16))
    with refused("does not exist on Ascend310P3"):
        torch_npu.npu_fused_infer_attention_score(
            query, query, query, actual_seq_lengths=[2], actual_seq_lengths_kv=[2], num_heads=2, input_layout="TND"
        )
    cache = npu(torch.zeros(1, 128, 2, 128, dtype=torch.float16))
    with refused("does not exist on Ascend310P3"):
        torch_npu.npu_scatter_pa_kv_cache(query, query, cache, cache, npu(torch.tensor([0, 1])), cache_mode="Norm")


def test_a_plain_cache_is_refused() -> None:
    key, cache = npu(randn(3, GROUPS, DIM, dtype=torch.float16)), npu(torch.zeros(2, BLOCK, GROUPS, DIM).half())
    with pytest.raises(Exception, match=r"is not \[blocks, 2 \* 64 / 16, block_size, 16\]"):
        torch_npu._npu_reshape_and_cache(key, key, cache, cache, npu(torch.arange(3, dtype=torch.int32)))


def test_a_mixture_of_experts_counts_in_running_sums() -> None:
    x, picks = npu(randn(3, 16, dtype=torch.float16)), npu(torch.tensor([[0, 2], [2, 3], [1, 0]], dtype=torch.int32))
    counts = torch_npu.npu_moe_init_routing_v2(
        x, picks, active_num=6, expert_num=4, expert_tokens_num_type=1, expert_tokens_num_flag=True,
        active_expert_range=[0, 4], quant_mode=-1,
    )[2]  # fmt: skip
    assert counts.tolist() == [2, 3, 5, 6]


def test_legacy_operators_are_named() -> None:
    x, table = npu(randn(1, 3, 2, 128, dtype=torch.float16)), npu(randn(1, 3, 1, 128, dtype=torch.float16))
    with pytest.raises(RuntimeError, match=r"(?s)\[emulated Ascend\] the legacy operator \w+ is not emulated"):
        torch_npu.npu_rotary_mul(x, table, table)
