"""The block pool: states of a block, eviction order, and what a hash stands for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.block_pool import PADDING_BLOCK, BlockPool, hash_block


def chain(*blocks: list[int], salt: bytes = b"") -> list[bytes]:
    hashes: list[bytes] = []
    for tokens in blocks:
        hashes.append(hash_block(hashes[-1] if hashes else b"", tokens, b"" if hashes else salt))
    return hashes


def test_the_padding_block_is_never_handed_out():
    pool = BlockPool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert PADDING_BLOCK not in pool.free and pool.num_free == 0


def test_a_pool_needs_a_block_besides_padding():
    with pytest.raises(ValueError, match="num_blocks=1"):
        BlockPool(1)


def test_empty_blocks_are_reused_before_cached_ones_and_cached_ones_least_recently_used_first():
    pool = BlockPool(6)
    old, new, plain = pool.allocate(2), pool.allocate(2), pool.allocate(1)
    for block, block_hash in zip(old, chain([1], [2]), strict=True):
        pool.register(block, block_hash)
    for block, block_hash in zip(new, chain([3], [4]), strict=True):
        pool.register(block, block_hash)
    pool.release(old)
    pool.release(new)
    pool.release(plain)
    assert pool.allocate(1) == plain
    # The tail of a chain goes before its head: a head without its tail is still of use.
    assert pool.allocate(4) == [old[1], old[0], new[1], new[0]]
    assert not pool.cached


def test_a_hit_takes_a_block_off_the_free_list_and_saves_it_from_eviction():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    hashes = chain([1, 2], [3, 4])
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.register(block, block_hash)
    pool.release(blocks)
    hit = pool.match(hashes)
    assert hit == blocks
    pool.acquire(hit)
    assert pool.num_free == 1
    assert pool.allocate(1)[0] not in hit
    assert pool.match(hashes) == blocks


def test_the_same_block_after_another_prefix_is_no_hit():
    # field_lessons 1.6-5 and 5.1: a block re-used for (B + T) must not be found for (A + T).
    pool = BlockPool(4)
    a, b = chain([1], [9]), chain([2], [9])
    blocks = pool.allocate(2)
    pool.register(blocks[0], b[0])
    pool.register(blocks[1], b[1])
    assert pool.match(a) == []
    assert a[1] != b[1]


def test_evicting_a_block_removes_its_entry_only():
    pool = BlockPool(3)
    first, second = pool.allocate(1)[0], pool.allocate(1)[0]
    (same,) = chain([7])
    pool.register(first, same)
    pool.register(second, same)  # a duplicate stays anonymous
    assert pool.hash_of[second] is None
    pool.release([second])
    pool.allocate(1)
    assert pool.match([same]) == [first]
    pool.release([first])
    pool.allocate(1)
    assert pool.match([same]) == []


def test_salts_keep_chains_apart():
    assert set(chain([1, 2], [3], salt=b"tenant-a")).isdisjoint(chain([1, 2], [3], salt=b"tenant-b"))
    assert set(chain([1, 2], [3])).isdisjoint(chain([1, 2], [3], salt=b"x"))


def test_hashes_are_at_least_128_bits():
    assert len(hash_block(b"", [1])) * 8 >= 128


def test_reset_is_refused_while_a_block_is_owned():
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.register(block, hash_block(b"", [1]))
    assert not pool.reset_cache()
    assert pool.cached
    pool.release([block])
    assert pool.reset_cache()
    assert not pool.cached and pool.num_free == 2


@given(
    st.lists(st.tuples(st.sampled_from(["allocate", "release", "register", "hit"]), st.integers(0, 30)), max_size=60)
)
def test_every_block_is_in_exactly_one_state(operations: list[tuple[str, int]]):
    pool = BlockPool(9)
    tables: list[list[int]] = []
    for name, number in operations:
        if name == "allocate" and 0 < number % 4 <= pool.num_free:
            tables.append(pool.allocate(number % 4))
        elif name == "release" and tables:
            pool.release(tables.pop(number % len(tables)))
        elif name == "register" and tables:
            for position, block in enumerate(tables[number % len(tables)]):
                if pool.hash_of[block] is None:
                    pool.register(block, hash_block(b"", [number, position]))
        elif name == "hit":
            hit = pool.match([hash_block(b"", [number, position]) for position in range(4)])
            if hit:
                pool.acquire(hit)
                tables.append(hit)
        owned = [block for table in tables for block in table]
        for block in range(1, pool.num_blocks):
            assert pool.ref_count[block] == owned.count(block)
            assert (block in pool.free) == (block not in owned)
        assert {b for b in range(9) if pool.hash_of[b] is not None} == set(pool.cached.values())
        unhashed = [pool.hash_of[block] is None for block in pool.free]
        assert unhashed == sorted(unhashed, reverse=True)  # empty ones first
