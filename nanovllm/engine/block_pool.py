"""The pool of KV cache blocks: reference counts, prefix-cache index, LRU eviction. All operations are O(1) per block.

A block is in exactly one of three states:

    owned    ref_count > 0                       some request's block table names it
    cached   ref_count = 0, has a hash, is free  evictable, but a prefix hit brings it back
    empty    ref_count = 0, no hash, is free

``free`` holds cached and empty blocks in the order in which they will be handed out: empty blocks first, then cached
ones, least recently used first. Block 0 is never handed out: padded rows write there.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

PADDING_BLOCK = 0


def hash_block(parent: bytes, token_ids: Sequence[int], extra: bytes = b"") -> bytes:
    """Hash a full block together with everything before it: SHA-256 over (parent hash, extra keys, tokens).

    ``parent`` is the hash of the previous block of the chain, or ``b""`` for the first block, whose ``extra`` then
    carries what must keep chains apart (a tenant's salt; later an adapter, an image). Equal hashes mean equal prefixes.
    """
    digest = hashlib.sha256(parent)
    digest.update(len(extra).to_bytes(4, "little"))
    digest.update(extra)
    digest.update(array("i", token_ids).tobytes())
    return digest.digest()


class BlockPool:
    """Hands out block ids ``1 .. num_blocks - 1``.

    Args:
        num_blocks: blocks in the cache, the padding block included.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks={num_blocks}: the cache needs the padding block and at least one more")
        self.num_blocks = num_blocks
        self.ref_count = [0] * num_blocks
        self.hash_of: list[bytes | None] = [None] * num_blocks
        self.cached: dict[bytes, int] = {}
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self.changed: set[int] | None = None  # blocks whose state may have changed, for whoever sets a set here

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, cached ones included."""
        return len(self.free)

    @property
    def num_usable(self) -> int:
        """Blocks that can be allocated when nothing is running."""
        return self.num_blocks - 1

    def allocate(self, count: int) -> list[int]:
        """Take ``count <= num_free`` blocks with reference count 1, evicting cached ones if need be."""
        pop, blocks = self.free.popitem, []
        for _ in range(count):
            block, _none = pop(last=False)
            if self.hash_of[block] is not None:
                self.forget(block)
            self.ref_count[block] = 1
            blocks.append(block)
        if self.changed is not None:
            self.changed.update(blocks)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block: a prefix hit (which takes it out of the free list) or a fork."""
        for block in blocks:
            if self.ref_count[block] == 0:
                del self.free[block]
            self.ref_count[block] += 1
            if self.changed is not None:
                self.changed.add(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each block of a table. The tail is freed first, so that it is evicted before the head."""
        if self.changed is not None:
            self.changed.update(blocks)
        for block in reversed(blocks):
            self.ref_count[block] -= 1
            if self.ref_count[block] == 0:
                self.free[block] = None
                if self.hash_of[block] is None:
                    self.free.move_to_end(block, last=False)

    def register(self, block: int, block_hash: bytes) -> None:
        """Make a full, computed block findable. A duplicate of a cached block stays anonymous."""
        if block_hash not in self.cached:
            self.cached[block_hash] = block
            self.hash_of[block] = block_hash
            if self.changed is not None:
                self.changed.add(block)

    def match(self, block_hashes: Iterable[bytes]) -> list[int]:
        """The longest run of cached blocks from the start of a hash chain. Takes no reference."""
        blocks = []
        for block_hash in block_hashes:
            block = self.cached.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def reset_cache(self) -> bool:
        """Forget all cached prefixes. False, and nothing changes, while any block is owned."""
        if self.num_free != self.num_usable:
            return False
        for block in list(self.cached.values()):
            self.forget(block)
        return True

    def forget(self, block: int) -> None:
        """Make a block unfindable, whoever owns it."""
        block_hash = self.hash_of[block]
        self.hash_of[block] = None
        if self.changed is not None:
            self.changed.add(block)
        if block_hash is not None and self.cached.get(block_hash) == block:
            del self.cached[block_hash]
