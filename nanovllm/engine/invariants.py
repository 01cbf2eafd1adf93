"""What must hold after every plan and every result, checked from outside. For tests and debugging: O(everything)."""

from __future__ import annotations

from collections import Counter

from nanovllm.engine.block_pool import PADDING_BLOCK, hash_block
from nanovllm.engine.plan import StepPlan
from nanovllm.engine.request import Request, RequestStatus
from nanovllm.engine.scheduler import Scheduler


class InvariantError(AssertionError):
    """The scheduler has broken a promise."""


class InvariantChecker:
    """Watches one scheduler. Call `planned` after each plan and `updated` after each result.

    Besides the static invariants it keeps a ledger of slots: a slot is written once per allocation of its block, only
    by a request that owns the block alone, and never read before it is written.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.num_slots_written = 0  # tokens computed in total
        self._tables: dict[int, list[int]] = {}  # row -> block table, rebuilt from the plans alone
        self._written: dict[int, set[int]] = {}  # block -> offsets written since it was allocated
        self._allocated: list[int] = []  # since the last plan
        allocate = scheduler.kv.pool.allocate

        def noted_allocate(count: int) -> list[int]:
            blocks = allocate(count)
            self._allocated += blocks
            return blocks

        scheduler.kv.pool.allocate = noted_allocate  # type: ignore[method-assign]

    def planned(self, plan: StepPlan) -> None:
        """Check a plan against the scheduler's limits, then replay its writes."""
        config, block_size = self.scheduler.config, self.scheduler.kv.block_size
        _expect(plan.rows, "an empty plan")
        _expect(len(set(plan.rows)) == len(plan.rows), "a row is in the plan twice", plan)
        _expect(sum(plan.num_new) == plan.num_tokens <= config.max_num_batched_tokens, "token budget exceeded", plan)
        _expect(len(plan.rows) <= config.max_num_seqs, "more rows than max_num_seqs", plan)
        _expect(all(n > 0 for n in plan.num_new), "a row without work", plan)
        _expect(sorted(plan.num_new, key=lambda n: n != 1) == plan.num_new, "one-token rows must come first", plan)
        for start in plan.starts:
            self._tables[start.row] = []
        for row, first, blocks in plan.block_updates:
            table = self._tables[row]
            _expect(first <= len(table), "a hole in a block table", plan)
            table[first : first + len(blocks)] = blocks
        # All copies read before anything is written: a source may have been freed and handed out again in this plan.
        copied = {target: set(self._written[source]) for source, target in plan.copies}
        _expect(len(copied) == len(plan.copies), "a block is the target of two copies", plan)
        for block in self._allocated:
            self._written[block] = set()
        self._allocated = []
        for request, row, start_at, count in zip(
            plan.requests, plan.rows, plan.num_computed, plan.num_new, strict=True
        ):
            table = self._tables[row]
            _expect(table[: len(request.blocks)] == request.blocks, "the runner's block table differs", request, table)
            first, kept = table[start_at // block_size], range(start_at % block_size)
            if first in copied:  # what the source holds beyond the shared tokens does not count as written
                self._written[first] = copied[first].intersection(kept)
            for position in range(start_at):
                block, offset = table[position // block_size], position % block_size
                _expect(offset in self._written[block], f"position {position} is read before it is written", request)
            for position in range(start_at, start_at + count):
                block, offset = table[position // block_size], position % block_size
                _expect(block != PADDING_BLOCK, "a request owns the padding block", request)
                _expect(self.scheduler.kv.pool.ref_count[block] == 1, f"shared block {block} is written", request)
                written = self._written[block]
                _expect(offset not in written, f"slot {offset} of block {block} is written twice", request)
                written.add(offset)
                self.num_slots_written += 1
        self.check()

    def updated(self) -> None:
        """Check after a result, an abort, or at any quiet moment."""
        self.check()

    def check(self) -> None:
        """The static invariants: free + cached + owned = total, references counted, hashes true, queues consistent."""
        scheduler, pool = self.scheduler, self.scheduler.kv.pool
        holders: list[Request] = [*scheduler.running, *scheduler.leaving.values(), *scheduler.held.values()]
        counted = Counter(block for request in holders for block in request.blocks)
        for block in range(1, pool.num_blocks):
            references = pool.ref_count[block]
            _expect(references == counted[block], f"block {block}: {references} references, {counted[block]} holders")
            _expect((references == 0) == (block in pool.free), f"block {block} is free and owned, or neither")
        _expect(PADDING_BLOCK not in pool.free and PADDING_BLOCK not in counted, "the padding block is in use")
        for block_hash, block in pool.cached.items():
            _expect(pool.hash_of[block] == block_hash, f"cached entry of block {block} is stale")
        _expect(sum(h is not None for h in pool.hash_of) == len(pool.cached), "a hashed block cannot be found")
        for request in holders:
            self._check_request(request)
        running = scheduler.running
        _expect(all(r.status == RequestStatus.RUNNING for r in running), "a request in running is not")
        _expect([r.place for r in running] == sorted(r.place or () for r in running), "running is not sorted")
        suspects = list(scheduler.suspects)
        _expect(all(r.num_faults and not r.finished for r in suspects), "a suspect is none", suspects)
        _expect(len(suspects) == sum(r.num_faults > 0 for r in scheduler.requests.values()), "a suspect is in no group")
        self._check_queue()
        waiting = list(scheduler.waiting)
        waiting += [r for r in suspects if r.status == RequestStatus.WAITING]
        _expect(len(waiting) == scheduler.num_waiting, "num_waiting is wrong", len(waiting), scheduler.num_waiting)
        _expect(all(not r.blocks and r.row == -1 for r in waiting), "a waiting request holds something")
        rows = [r.row for r in holders if r.row >= 0] + scheduler._free_rows
        _expect(sorted(rows) == list(range(scheduler.config.max_num_seqs)), "rows are lost or held twice", rows)
        dormant = [fork for r in scheduler.requests.values() for fork in r.forks.values()]
        everyone = [r.request_id for r in (*running, *waiting, *dormant)]
        _expect(sorted(everyone) == sorted(scheduler.requests), "requests are lost or queued twice")

    def idle(self) -> None:
        """Check that nothing is left behind once every request has ended."""
        scheduler = self.scheduler
        self.check()
        _expect(not scheduler.has_work and not scheduler.running and scheduler.num_waiting == 0, "work is left")
        _expect(not scheduler.held, "blocks are held for nobody", scheduler.held)
        _expect(not list(scheduler.waiting.flows()), "the queue remembers tenants although nobody is there")
        _expect(scheduler.kv.pool.num_free == scheduler.kv.pool.num_usable, "blocks leaked")

    def _check_queue(self) -> None:
        """Counts of the queue are true, and no tenant that waits is behind the virtual time of its level."""
        queue, running = self.scheduler.waiting, Counter((r.key[0], r.tenant) for r in self.scheduler.running)
        for flow in queue.flows():
            level = flow.level
            waiting = [r for _, r in flow.heap if not r.finished]
            _expect(len(waiting) == flow.num_waiting, "num_waiting of a tenant is wrong", flow.tenant)
            _expect(
                flow.num_running == running.pop((level.priority, flow.tenant), 0), "num_running of a tenant is wrong"
            )
            _expect(not waiting or flow.virtual >= level.virtual, "a tenant is behind its level", flow.tenant)
            _expect(flow in level.flows.values(), "a tenant is in no level", flow.tenant)
        _expect(not running, "running requests of tenants that the queue does not know", running)

    def _check_request(self, request: Request) -> None:
        kv = self.scheduler.kv
        _expect(len(set(request.blocks)) == len(request.blocks), "a block is in a table twice", request)
        _expect(len(request.blocks) * kv.block_size >= request.num_computed, "computed tokens without a slot", request)
        parent = b""
        for index, block in enumerate(request.blocks):
            tokens = request.token_ids[index * kv.block_size : (index + 1) * kv.block_size]
            if len(tokens) < kv.block_size or (kv.pool.hash_of[block] is None and index >= request.num_registered):
                break
            parent = hash_block(parent, tokens, b"" if index else request.salt)
            found = kv.pool.hash_of[block]
            _expect(found is None or found == parent, f"block {block} is cached under another prefix", request)


def _expect(condition: object, message: str, *details: object) -> None:
    if not condition:
        raise InvariantError(": ".join([message, *map(repr, details)]))
