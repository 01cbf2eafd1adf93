"""Block tables: which blocks a request holds, which it shares, and when it must copy one.

table of a running request, block_size 4, num_computed 10

positions   0 1 2 3   4 5 6 7   8 9 . .
blocks     [   7   ] [   3   ] [   9   ]
            full, immutable      partly filled: written next
            shared by hash       shared only between forks, copied before the next write
"""

from __future__ import annotations

from nanovllm.engine.block_pool import BlockPool
from nanovllm.engine.plan import StepPlan
from nanovllm.engine.request import Request


class KVCacheManager:
    """Grows, shares and frees the block tables of requests; records every change of a table in the step's plan."""

    def __init__(self, pool: BlockPool, block_size: int, enable_prefix_caching: bool) -> None:
        self.pool = pool
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def admit(self, request: Request, plan: StepPlan, max_new: int, whole: bool = False) -> int:
        """Give a waiting request its first blocks, re-using what a fork's parent or the prefix cache holds.

        Returns the number of tokens to compute in this step, at most ``max_new``; 0, and nothing changes, if the
        request must go on waiting: not all of its tokens would fit into the pool now, or not into this step if
        ``whole``. At least one token is left to compute: its logits are needed.
        """
        shared, num_shared = self._shareable(request)
        missing = request.num_tokens - num_shared
        if whole and missing > max_new:
            return 0
        full = num_shared // self.block_size
        shared, tail = shared[:full], shared[full:]
        # Shared blocks on the free list are part of the demand: taking them shortens the list.
        demand = self.blocks_for(request.num_tokens) - full + sum(self.pool.ref_count[b] == 0 for b in shared)
        if demand > self.pool.num_free:
            return 0
        self.pool.acquire(shared)
        request.blocks = list(shared)
        request.num_computed = num_shared
        request.num_registered = full
        if tail:  # partly filled, and this request will write into it: copy on write
            request.blocks += self.pool.allocate(1)
            plan.copies.append((tail[0], request.blocks[-1]))
        if request.blocks:
            plan.block_updates.append((request.row, 0, list(request.blocks)))
        count = min(missing, max_new)
        self.grow(request, count, plan)  # cannot fail: the demand was counted
        if request.num_preemptions == 0:
            request.num_cached_tokens = num_shared
        return count

    def _shareable(self, request: Request) -> tuple[list[int], int]:
        """Blocks, and the tokens in them, that a waiting request need not compute."""
        limit = request.num_tokens - 1
        parent = request.fork_of
        if parent is not None and parent.blocks:
            num_tokens = min(limit, parent.num_computed)
            blocks = parent.blocks[: self.blocks_for(num_tokens)]
            return blocks, num_tokens
        if not self.enable_prefix_caching or request.params.skip_reading_prefix_cache:
            return [], 0
        blocks = self.pool.match(request.hashes(limit // self.block_size, self.block_size))
        return blocks, len(blocks) * self.block_size

    def grow(self, request: Request, num_new: int, plan: StepPlan) -> bool:
        """Make room for the next ``num_new`` tokens; False, and nothing changes, if the pool has too few blocks."""
        held = len(request.blocks)
        missing = self.blocks_for(request.num_computed + num_new) - held
        if missing > self.pool.num_free:
            return False
        if missing > 0:
            new = self.pool.allocate(missing)
            request.blocks += new
            plan.block_updates.append((request.row, held, new))
        return True

    def register(self, request: Request, num_done: int) -> None:
        """Make the blocks that are full now findable. ``num_done`` tokens are in the cache: their step has reported."""
        full = num_done // self.block_size
        if self.enable_prefix_caching:
            chain = request.hashes(full, self.block_size)
            for index in range(request.num_registered, full):
                self.pool.register(request.blocks[index], chain[index])
        request.num_registered = full

    def distrust(self, request: Request) -> None:
        """Let nobody find the blocks of a request any more."""
        for block in request.blocks:
            self.pool.forget(block)

    def free(self, request: Request) -> None:
        """Drop all blocks of a request, once."""
        self.pool.release(request.blocks)
        request.blocks = []
