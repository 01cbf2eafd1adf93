"""The C++ kernels against ops/reference.py, on every instruction set this machine has, and their invariances."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from cpu_batches import PagedBatch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanovllm.errors import ParameterError
from nanovllm.ops import AttentionMetadata, Operators, reference, torch_operators
from nanovllm.ops.cpu import library as cpu_library
from nanovllm.ops.cpu import operators
from nanovllm.ops.cpu.linear import QUANTIZATIONS, CpuLinear, PackedWeight

INSTRUCTION_SETS = cpu_library.supported_instruction_sets()
pytestmark = pytest.mark.skipif(not INSTRUCTION_SETS, reason="the C++ kernels are not built")

REFERENCE = torch_operators("reference")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = st.sampled_from(FLOATS)
SEEDS = st.integers(0, 2**31)


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def ops(instruction_set: str) -> Operators:
    """The operators on one instruction set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cpu_library.VARIABLE, instruction_set)
        table = operators(REFERENCE)
    assert table.rms_norm is not REFERENCE.rms_norm
    return table


def normal(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, steps: float = 1.0) -> None:
    """Equal up to ``steps`` units in the last place of the dtype, relative to the largest magnitudes around 1."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    eps = torch.finfo(actual.dtype).eps * steps
    torch.testing.assert_close(actual.float(), expected.float(), rtol=eps, atol=eps)


def attend(ops: Operators, batch: PagedBatch, chunks: list, window: int | None, scale: float = 0.2) -> torch.Tensor:
    q, meta = batch.step(chunks)
    ops.prepare_attention(meta, [window], q.dtype)
    return ops.paged_attention(q, batch.k_cache, batch.v_cache, meta, scale, window)


def attend_in_float64(batch: PagedBatch, chunks: list, window: int | None, scale: float = 0.2) -> torch.Tensor:
    q, meta = batch.step(chunks)
    k, v = batch.k_cache.double(), batch.v_cache.double()
    return reference.paged_attention(q.double(), k, v, meta, scale, window)


# ---- attention ----------------------------------------------------------------------------------------------------

CHUNK_LENGTHS = st.lists(
    st.tuples(st.integers(0, 150), st.integers(0, 130)).filter(lambda pair: sum(pair) > 0), min_size=1, max_size=5
)


@settings(max_examples=12)
@given(
    lengths=CHUNK_LENGTHS,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 16),
    head_dim=st.sampled_from([10, 32, 40, 64, 80, 96, 128, 256]),
    block_size=st.sampled_from([8, 16, 32, 100, 256]),
    window=st.one_of(st.none(), st.integers(1, 200)),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_attention_agrees_with_the_reference(
    ops, lengths, kv_heads, group, head_dim, block_size, window, dtype, seed
) -> None:
    """Any mix of contexts and chunks, rows without new tokens among them."""
    batch = PagedBatch([sum(pair) for pair in lengths], kv_heads * group, kv_heads, head_dim, block_size, dtype, seed)
    chunks = [(row, context, context + new) for row, (context, new) in enumerate(lengths)]
    if all(new == 0 for _, new in lengths):
        chunks[0] = (0, lengths[0][0] - 1, lengths[0][0])
    expected = attend_in_float64(batch, chunks, window, head_dim**-0.5)
    steps = 64.0 if dtype == torch.float32 else 4.0
    assert_close(attend(ops, batch, chunks, window, head_dim**-0.5), expected.to(dtype), steps)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("window", [None, 1000])
def test_attention_over_4k_tokens(ops, dtype: torch.dtype, window: int | None) -> None:
    """Several partitions: divided among threads, and merged."""
    batch = PagedBatch([4100, 1], 4, 2, 64, 16, dtype)
    chunks = [(0, 4099, 4100), (1, 0, 1), (0, 4000, 4100)]
    expected = attend_in_float64(batch, chunks, window)
    assert_close(attend(ops, batch, chunks, window), expected.to(dtype), 64.0 if dtype == torch.float32 else 2.0)


def test_attention_survives_extreme_scores(ops) -> None:
    """Scores far below and above the range of exp, and scores that are all very negative."""
    batch = PagedBatch([70, 70], 2, 1, 32, 16, torch.float32)
    for scale in (1e4, 1e-4, -1e4):
        out = attend(ops, batch, [(0, 0, 70), (1, 69, 70)], None, scale)
        expected = attend_in_float64(batch, [(0, 0, 70), (1, 69, 70)], None, scale)
        assert_close(out, expected.float(), 64.0 if abs(scale) < 1 else 1e5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("threads", [1, 3])
def test_attention_of_a_token_is_the_same_bits_in_any_batch(ops, instruction_set, dtype, window, threads) -> None:
    """Alone, in a batch of 32, with the prompt in chunks, with a prefix found in the cache, on more threads."""
    lengths = [1200, *(37 * i % 650 + 1 for i in range(31))]
    batch = PagedBatch(lengths, 6, 2, 64, 16, dtype)
    whole = attend(ops, batch, [(row, 0, length) for row, length in enumerate(lengths)], window)
    rows = list(whole.split(lengths))
    library = cpu_library.load_library(instruction_set)
    library.set_threads(threads)
    try:
        for row in (0, 5, 20):
            length = lengths[row]
            assert torch.equal(attend(ops, batch, [(row, 0, length)], window), rows[row])  # alone
            last = length // 3
            assert torch.equal(attend(ops, batch, [(row, last, length)], window), rows[row][last:])  # prefix hit
        decodes = attend(ops, batch, [(row, length - 1, length) for row, length in enumerate(lengths)], window)
        assert torch.equal(decodes, torch.stack([row[-1] for row in rows]))
        for chunk in (1, 7, 500):
            steps = range({1: 1150, 7: 500, 500: 0}[chunk], 1200, chunk)
            parts = [attend(ops, batch, [(3, 0, 5), (0, s, min(s + chunk, 1200))], window)[5:] for s in steps]
            assert torch.equal(torch.cat(parts), rows[0][steps.start :])
    finally:
        library.set_threads(torch.get_num_threads())


# ---- norms, rotary, activation, cache -------------------------------------------------------------------------------


@settings(max_examples=15)
@given(rows=st.integers(0, 40), n=st.integers(1, 300), dtype=DTYPES, seed=SEEDS)
@example(rows=70, n=1024, dtype=torch.bfloat16, seed=1)  # enough for several threads
def test_norms_agree_with_the_reference(ops, rows, n, dtype, seed) -> None:
    x, residual = normal(seed, rows, n, dtype=dtype), normal(seed + 1, rows, n, dtype=dtype)
    weight = normal(seed + 2, n, dtype=dtype)
    assert_close(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), 4.0)
    actual, expected = ops.add_rms_norm(x, residual, weight, 1e-6), reference.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(actual[1], expected[1])
    assert_close(actual[0], expected[0], 4.0)


@settings(max_examples=15)
@given(
    tokens=st.integers(0, 12),
    heads=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([2, 32, 64, 80, 96, 128, 256]),
    block_size=st.sampled_from([1, 8, 16]),
    norms=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
@example(tokens=100, heads=16, kv_heads=8, head_dim=128, block_size=16, norms=True, dtype=torch.bfloat16, seed=1)
def test_the_steps_before_attention_agree_with_the_reference(
    ops, tokens, heads, kv_heads, head_dim, block_size, norms, dtype, seed
) -> None:
    """Rotation and cache write bit for bit; the norm up to its last bit. No other slot is touched."""
    qkv = normal(seed, tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    cos, sin = (normal(seed + i, tokens, 1, head_dim, dtype=dtype) for i in (1, 2))
    weights = [normal(seed + i, head_dim, dtype=dtype) for i in (3, 4)] if norms else [None, None]
    slots = torch.randperm(tokens + 20, generator=torch.Generator().manual_seed(seed))[:tokens]
    blocks = (-(-(tokens + 20) // block_size), block_size, kv_heads, head_dim)
    results = []
    for table in (ops, REFERENCE):
        caches = [normal(5, *blocks, dtype=dtype) for _ in range(2)]
        results.append([table.norm_rotate_write(qkv, *weights, 1e-6, cos, sin, *caches, slots), *caches])
    for actual, expected in zip(*results, strict=True):
        if norms:
            assert_close(actual, expected, 16.0)
        else:
            assert torch.equal(actual, expected)
    assert torch.equal(results[0][2], results[1][2])


@settings(max_examples=15)
@given(rows=st.integers(0, 20), n=st.integers(1, 300), dtype=DTYPES, seed=SEEDS, spread=st.sampled_from([1.0, 30.0]))
@example(rows=20, n=3072, dtype=torch.bfloat16, seed=1, spread=3.0)
def test_silu_and_mul_agrees_with_the_reference(ops, rows, n, dtype, seed, spread) -> None:
    x = (normal(seed, rows, 2 * n, dtype=torch.float32) * spread).to(dtype)
    assert_close(ops.silu_and_mul(x), reference.silu_and_mul(x), 4.0)


def test_silu_of_numbers_at_the_edges(ops) -> None:
    """Where exp overflows or vanishes, and what is not a number."""
    gate = torch.tensor([-1e30, -104.0, -88.8, -0.0, 0.0, 88.0, 1e30, float("inf"), float("nan")])
    x = torch.cat((gate, torch.ones(9)))[None]
    torch.testing.assert_close(ops.silu_and_mul(x), reference.silu_and_mul(x), rtol=1e-6, atol=1e-36, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rounding_is_to_nearest_even_for_every_number(ops, dtype: torch.dtype) -> None:
    """A product with 1 and a sum with 0, over all 16-bit patterns."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    x = bits.view(torch.bfloat16).float().to(dtype)[None]
    one_more = x + x * 2**-9
    zero = torch.zeros_like(x)
    _, total = ops.add_rms_norm(one_more, zero, torch.ones_like(x[0]), 1.0)
    finite = one_more.isfinite()
    assert torch.equal(total[finite], one_more[finite])
    assert torch.equal(total.isnan(), one_more.isnan())


@pytest.mark.parametrize("dtype", FLOATS)
def test_caches_that_share_their_blocks_hold_what_separate_ones_do(ops, dtype: torch.dtype) -> None:
    """Written by the kernels or by the reference, read by attention, copied block by block."""
    tokens, layers, shape = 40, 3, (9, 16, 2, 64)
    separate = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(layers)]
    meta = AttentionMetadata(
        query_start_loc=[0, tokens],
        seq_lens=[tokens],
        num_decodes=0,
        max_query_len=tokens,
        max_seq_len=tokens,
        block_table=torch.tensor([[5, 2, 7]], dtype=torch.int32),
        slot_mapping=torch.tensor([b * 16 + i for b in (5, 2, 7) for i in range(16)][:tokens]),
        block_size=16,
    )
    cos, sin = (normal(seed, tokens, 1, 64, dtype=dtype) for seed in (1, 2))
    for table in (ops, REFERENCE):
        shared = ops.new_caches(layers, *shape, dtype, torch.device("cpu"))
        for each in (shared, separate):
            for cache in (cache for pair in each for cache in pair):
                assert cache.shape == shape and cache.dtype == dtype and not cache[0].any()
                cache[1:] = 0
        assert {cache.stride() for pair in shared for cache in pair} == {(2 * layers * 2048, 128, 64, 1)}
        for layer in range(layers):
            qkv = normal(10 + layer, tokens, 4 + 2 * 2, 64, dtype=dtype)
            found = []
            for caches in (shared, separate):
                q = table.norm_rotate_write(qkv, None, None, 1e-6, cos, sin, *caches[layer], meta.slot_mapping)
                ops.prepare_attention(meta, [None], dtype)
                found.append(ops.paged_attention(q, *caches[layer], meta, 0.125, None))
            assert torch.equal(*found)
        for caches in (shared, separate):
            ops.copy_blocks(caches, [5, 2], [2, 8])
        for ours, plain in zip(shared, separate, strict=True):
            assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])


# ---- linear -------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    rows=st.integers(0, 20),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 200),
    bias=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
@example(rows=400, inputs=64, outputs=130, bias=True, dtype=torch.bfloat16, seed=1)  # more than one task's rows
@example(rows=20, inputs=2600, outputs=130, bias=True, dtype=torch.bfloat16, seed=1)  # a depth that is cut
def test_linear_agrees_with_the_reference(ops, rows, inputs, outputs, bias, dtype, seed) -> None:
    x, weight = normal(seed, rows, inputs, dtype=dtype), normal(seed + 1, outputs, inputs, dtype=dtype)
    b = normal(seed + 2, outputs, dtype=dtype) if bias else None
    expected = x.double() @ weight.double().T + (b.double() if bias else 0.0)
    actual = ops.linear(x, ops.pack_linear(weight), b)
    error = 1e-5 * inputs**0.5 + torch.finfo(dtype).eps * expected.abs()
    assert actual.dtype == dtype and ((actual.double() - expected).abs() <= error).all()


@pytest.mark.parametrize("inputs", [300, 2600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_of_a_row_is_the_same_bits_in_any_batch(ops, instruction_set, dtype: torch.dtype, inputs: int) -> None:
    """Any number of rows, also as a view of wider rows, on any number of threads; with depths that are cut, too."""
    weight, bias = normal(1, 200, inputs, dtype=dtype), normal(2, 200, dtype=dtype)
    wide = normal(3, 500, inputs + 400, dtype=dtype)
    x = wide[:, 100:-300]
    packed = ops.pack_linear(weight)
    expected = torch.cat([ops.linear(row[None], packed, bias) for row in x])
    library = cpu_library.load_library(instruction_set)
    try:
        for threads in (1, 3):
            library.set_threads(threads)
            for rows in (2, 3, 5, 6, 7, 32, 96, 97, 193, 500):
                assert torch.equal(ops.linear(x[:rows], packed, bias), expected[:rows])
                assert torch.equal(ops.linear(x[-rows:].clone(), packed, bias), expected[-rows:])
    finally:
        library.set_threads(torch.get_num_threads())


# ---- quantised linear ---------------------------------------------------------------------------------------------


def dequantized(linear: CpuLinear, packed: PackedWeight, inputs: int) -> torch.Tensor:
    """The weight [out, in] as the kernel sees it: what it makes of unit vectors."""
    return linear.linear(torch.eye(inputs), packed, None).T.double()


@settings(max_examples=15)
@given(
    name=st.sampled_from(sorted(QUANTIZATIONS)),
    rows=st.integers(0, 20),
    inputs=st.integers(1, 5).map(lambda n: 64 * n),
    outputs=st.integers(1, 150),
    bias=st.booleans(),
    seed=SEEDS,
)
@example(name="int4", rows=400, inputs=64, outputs=130, bias=True, seed=1)
def test_quantized_linear_is_the_product_with_rounded_numbers(
    instruction_set, name, rows, inputs, outputs, bias, seed
) -> None:
    linear = CpuLinear(cpu_library.load_library(instruction_set), REFERENCE, name)
    weight, x = normal(seed, outputs, inputs, dtype=torch.float32), normal(seed + 1, rows, inputs, dtype=torch.float32)
    b = normal(seed + 2, outputs, dtype=torch.float32) if bias else None
    packed = linear.pack_linear(weight)
    w = dequantized(linear, packed, inputs)
    # Weights are off by half a step; by a whole one where int4 lacks +8.
    kind = QUANTIZATIONS[name]
    groups = weight.view(outputs, -1, kind.group or inputs).double()
    steps = groups.abs().amax(-1, keepdim=True) / (127 if kind.bits == 8 else 8)
    allowed = steps * (0.51 if kind.bits == 8 else 1.03) + 1e-6
    assert ((groups - w.view(groups.shape)).abs() <= allowed).all()
    # Numbers of x are off by half a step of their row.
    step = x.abs().amax(-1, keepdim=True).double() / (127 * 256 ** (kind.digits - 1)) if kind.digits else 0.0
    expected = x.double() @ w.T + (b.double() if bias else 0.0)
    error = 0.51 * step * w.abs().sum(-1) + 1e-5 * (1 + expected.abs())
    assert ((linear.linear(x, packed, b).double() - expected).abs() <= error).all()


@pytest.mark.parametrize("name", sorted(QUANTIZATIONS))
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantized_linear_of_a_row_is_the_same_bits_in_any_batch(instruction_set, name, dtype) -> None:
    linear = CpuLinear(cpu_library.load_library(instruction_set), REFERENCE, name)
    weight, bias, x = normal(1, 200, 320, dtype=dtype), normal(2, 200, dtype=dtype), normal(3, 400, 320, dtype=dtype)
    packed = linear.pack_linear(weight)
    expected = torch.cat([linear.linear(row[None], packed, bias) for row in x])
    for rows in (2, 3, 7, 32, 193, 400):
        assert torch.equal(linear.linear(x[:rows], packed, bias), expected[:rows])


@settings(max_examples=15)
@given(
    outputs=st.integers(1, 200), inputs=st.integers(1, 60), dtype=DTYPES, threads=st.sampled_from([1, 3]), seed=SEEDS
)
@example(outputs=128, inputs=34, dtype=torch.bfloat16, threads=1, seed=0)
@example(outputs=192, inputs=7, dtype=torch.float32, threads=3, seed=0)
def test_a_weight_packed_where_it_lies_equals_a_packed_copy(instruction_set, outputs, inputs, dtype, threads, seed):
    library = cpu_library.load_library(instruction_set)
    library.set_threads(threads)
    linear = CpuLinear(library, REFERENCE)
    weight = normal(seed, outputs, inputs, dtype=dtype)
    place = linear.allocate_matrix(outputs, inputs, dtype)
    assert place.shape == weight.shape and place.dtype == dtype
    place.copy_(weight)
    packed, copied = linear.pack_linear(place), linear.pack_linear(weight)
    library.set_threads(1)
    if dtype != torch.float16 and outputs % 64 == 0 and inputs % 2 == 0:
        assert packed.memory[0].data_ptr() == place.data_ptr()
    x = normal(seed + 1, 3, inputs, dtype=dtype)
    assert torch.equal(linear.linear(x, packed, None), linear.linear(x, copied, None))
    assert torch.equal(linear.rows(packed, torch.arange(outputs)), weight)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_a_packed_weight_are_those_of_the_weight(instruction_set, dtype: torch.dtype) -> None:
    """An embedding can read its rows from the output head."""
    linear = CpuLinear(cpu_library.load_library(instruction_set), REFERENCE)
    weight, indices = normal(1, 150, 72, dtype=dtype), torch.tensor([0, 149, 63, 64, 7, 7])
    assert torch.equal(linear.rows(linear.pack_linear(weight), indices), weight[indices])


@pytest.mark.parametrize("name", sorted(QUANTIZATIONS))
def test_rows_of_a_quantized_weight_are_those_its_products_see(instruction_set, name) -> None:
    linear = CpuLinear(cpu_library.load_library(instruction_set), REFERENCE, name)
    packed = linear.pack_linear(normal(1, 150, 128, dtype=torch.float32))
    indices = torch.tensor([0, 149, 63, 64, 7, 7])
    torch.testing.assert_close(linear.rows(packed, indices).double(), dequantized(linear, packed, 128)[indices])


@pytest.mark.parametrize("name", sorted(QUANTIZATIONS))
def test_quantized_linear_of_zeros_is_zero(instruction_set, name) -> None:
    """No scale is divided by."""
    linear = CpuLinear(cpu_library.load_library(instruction_set), REFERENCE, name)
    zeros, some = torch.zeros(3, 64), normal(1, 3, 64, dtype=torch.float32)
    assert torch.equal(linear.linear(zeros, linear.pack_linear(some), None), torch.zeros(3, 3))
    assert torch.equal(linear.linear(some, linear.pack_linear(zeros), None), torch.zeros(3, 3))


def test_an_unknown_quantization_is_an_error() -> None:
    with pytest.raises(ParameterError, match="quantization"):
        operators(REFERENCE, quantization="int3")


def test_an_instruction_set_the_machine_lacks_is_an_error() -> None:
    with pytest.raises(ParameterError, match="NANOVLLM_CPU_ISA"):
        cpu_library.load_library("avx1024")


@pytest.mark.parametrize("broken", ["not a library", "another library"])
def test_libraries_that_do_not_fit_are_passed_over_with_a_notice(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = INSTRUCTION_SETS[-1]
    file = tmp_path / cpu_library.library_file(name)
    if broken == "not a library":
        file.write_bytes(b"nothing")
    else:
        import _ctypes

        shutil.copy(_ctypes.__file__, file)
    monkeypatch.setattr(cpu_library, "LIBRARIES", tmp_path)
    assert cpu_library.load_library(name) is None
    assert "build them again" in caplog.text
