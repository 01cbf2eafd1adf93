"""The scheduler: a token budget, shared out each step among running and waiting requests.

    schedule:  waiting --admit--> running --> StepPlan          (may run ahead of results)
    update:    StepResult --> tokens, stop rules, block hashes, frees --> EngineOutputs

``running`` is sorted by place (`FairQueue`; with one tenant by priority and arrival), so every rank sees the same batch
and the victim of a preemption is always the last. A step serves decodes first, so no prompt, however long, makes a
running request wait; then chunks of prompts under way; then new prompts. Plans may be made before earlier ones have
reported: a request counts its pending tokens, and gives back its blocks only when no plan under way names it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from nanovllm.config import SchedulerConfig
from nanovllm.engine.block_pool import BlockPool
from nanovllm.engine.fair_queue import FairQueue
from nanovllm.engine.kv_cache import KVCacheManager
from nanovllm.engine.plan import EngineOutput, RowStart, StepPlan, StepResult
from nanovllm.engine.request import Request, RequestStatus
from nanovllm.engine.stop import check_stop
from nanovllm.engine.suspects import Suspects
from nanovllm.errors import ParameterError

Array = np.ndarray[Any, Any]

_place = attrgetter("place")

REGROWTH = 33 / 32  # of the tokens in a step after memory ran out, for every step that yields any


class Scheduler:
    """Decides what each step computes.

    Args:
        config: limits of a step, policy.
        num_blocks: blocks of the KV cache, the padding block included.
        block_size: tokens in a block.
    """

    def __init__(
        self, config: SchedulerConfig, num_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        self.config = config
        self.kv = KVCacheManager(BlockPool(num_blocks), block_size, enable_prefix_caching)
        self.running: list[Request] = []  # sorted by place
        self.waiting = FairQueue()
        self.requests: dict[str, Request] = {}  # not finished
        self.leaving: dict[str, Request] = {}  # finished, but a plan under way still names them
        self.held: dict[str, Request] = {}  # finished, blocks kept for forks, oldest first
        self.suspects = Suspects()  # their step raised; those that wait are not in ``waiting``
        self.num_waiting = 0
        self.num_preemptions = 0
        self.num_retries = 0  # requests computed again because their step raised
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._num_arrived = 0
        self._num_steps = 0
        self._pressed = False  # in this step, blocks ran short for a running request
        self._most_tokens: float = config.max_num_batched_tokens  # in a step; fewer for a while after memory ran out

    # -- requests come and go ------------------------------------------------------------------------------------

    def add(self, request: Request, priority: int = 0, forks: Sequence[Request] = ()) -> None:
        """Queue a request. ``forks`` (``n > 1``) are queued once its prompt is computed, and share its blocks.

        Raises:
            ParameterError: the id is in use, the request could not finish even with the cache to itself, or a priority
                is given that the policy does not look at.
        """
        if priority and self.config.policy != "priority":
            raise ParameterError("needs scheduling_policy='priority'", "priority", priority)
        family = [request, *forks]
        for member in family:
            if member.request_id in self.requests or member.request_id in self.leaving:
                raise ParameterError("a request of this id is under way", "request_id", member.request_id)
            needed = self.kv.blocks_for(member.max_total - 1)
            if needed > self.kv.pool.num_usable:
                raise ParameterError(
                    f"prompt and output of up to {member.max_total} tokens need {needed} blocks of the KV cache, which "
                    f"has {self.kv.pool.num_usable}; shorten them or give the cache more memory",
                    "max_tokens",
                    member.params.max_tokens,
                )
        for index, member in enumerate(family):
            if index > 0:
                member.fork_of = request
                request.forks[member.request_id] = member
            if member.fork_of is not None:
                member.fork_of.num_forks_waiting += 1
            member.key = (priority, self._num_arrived, index)
            self.requests[member.request_id] = member
        self._num_arrived += 1
        self._enqueue(request)

    def finish(self, request_ids: Iterable[str], reason: str) -> None:
        """End requests in whatever state they are: abort, stop string. Unknown and ended ones are passed over."""
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is not None:
                self._finish(request, reason)
        self._drop_finished()

    def release(self, request_id: str) -> None:
        """A held request gets no further forks: free its blocks once the forks that wait have taken their share."""
        for group in (self.requests, self.leaving, self.held):
            request = group.get(request_id)
            if request is not None:
                request.held = False
                self._free_if_forsaken(request)

    @property
    def has_work(self) -> bool:
        return bool(self.requests or self.leaving)

    # -- planning ------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """Plan the next step, or None if nothing can run before a plan under way has reported."""
        plan = StepPlan(self._num_steps)
        self._pressed = False
        if self.suspects:
            if any(request.num_in_flight for request in self.suspects.group):
                return None  # whatever follows would be void with it
            self._plan_suspects(plan)
        if not plan.requests:
            self._plan_all(plan)
        if not plan.requests:
            return None
        self._num_steps += 1
        return self._seal(plan)

    def _plan_all(self, plan: StepPlan) -> None:
        """Running requests, then newcomers."""
        budget = int(self._most_tokens)
        if budget < self.config.max_num_batched_tokens:
            budget = self._plan_chunks(plan, budget, self._unfinished(self.running))
        else:
            budget, chunks = self._plan_decodes(plan, budget)
            budget = self._plan_chunks(plan, budget, chunks)
        if not self._pressed and not self.suspects:  # whoever runs goes before newcomers in getting blocks
            self._plan_waiting(plan, budget)

    def _plan_suspects(self, plan: StepPlan) -> None:
        """Those on trial, and nobody else. None of them, if others that run have to leave them blocks first."""
        group = self.suspects.group
        budget = self._plan_chunks(plan, int(self._most_tokens), self._unfinished(group))
        for request in group:
            if request.status == RequestStatus.WAITING and budget > 0 and not self._pressed and self._free_rows:
                count = self._admit(request, plan, budget)
                if count == 0:
                    return
                budget -= count

    def _unfinished(self, requests: Iterable[Request]) -> list[Request]:
        """Those that run and lack tokens, decodes first; for steps in which there may not be room for every decode."""
        found = [
            request
            for request in requests
            if request.status == RequestStatus.RUNNING
            and request.num_tokens > request.num_computed
            and not (request.num_pending and request.num_tokens >= request.max_total)
        ]
        return sorted(found, key=lambda request: request.num_tokens - request.num_computed != 1)

    def _plan_decodes(self, plan: StepPlan, budget: int) -> tuple[int, list[Request]]:
        """Pass 1: running requests that lack one token. Also returns those that lack more.

        The budget suffices for all: max_num_batched_tokens >= max_num_seqs.
        """
        requests, chunks = plan.requests, []
        running, block_size, index = self.running, self.kv.block_size, 0
        while index < len(running):  # preemption shortens the list from its end
            request = running[index]
            index += 1
            missing = len(request.token_ids) + request.num_pending - request.num_computed
            if missing != 1:
                if missing > 1:
                    chunks.append(request)
                continue
            if request.num_pending and request.num_tokens >= request.max_total:
                continue  # the token under way is its last
            full = request.num_computed == len(request.blocks) * block_size
            if full and not self._make_room(request, 1, plan):
                continue
            requests.append(request)
        plan.num_new = [1] * len(requests)
        return budget - len(requests), chunks

    def _plan_chunks(self, plan: StepPlan, budget: int, chunks: list[Request]) -> int:
        """Pass 2: the next part of prompts under way."""
        for request in chunks:
            if request.status != RequestStatus.RUNNING:  # preempted for an earlier one
                continue
            count = min(request.num_tokens - request.num_computed, self._chunk_limit(budget))
            if count <= 0:
                break
            planned = len(plan.requests)
            if self._make_room(request, count, plan):
                plan.requests.append(request)
                plan.num_new.append(count)
                budget += planned + 1 - len(plan.requests) - count  # less the decodes preempted for it
        return budget

    def _plan_waiting(self, plan: StepPlan, budget: int) -> None:
        """Pass 3: admit waiting requests in order, while budget, rows and blocks last."""
        while budget > 0 and self._free_rows:
            request = self.waiting.peek()
            if request is None or request.num_in_flight:
                return
            count = self._admit(request, plan, budget)
            if count == 0:
                return
            budget -= count

    def _admit(self, request: Request, plan: StepPlan, budget: int) -> int:
        """Give a waiting request a row and blocks; the number of its tokens in this step, 0 if it has to go on waiting.

        Whoever waits for blocks goes before requests that hold some for forks, if nobody else will free any.
        """
        request.row = self._free_rows[-1]
        whole = not self.config.enable_chunked_prefill
        while not (count := self.kv.admit(request, plan, self._chunk_limit(budget), whole)):
            if plan.requests or self.running or not self._reclaim_held():
                request.row = -1
                return 0
        self._free_rows.pop()
        self.num_waiting -= 1
        if not request.num_faults:
            self.waiting.take(request)
        self.waiting.started(request)
        self._leave_parent(request)
        request.status = RequestStatus.RUNNING
        insort(self.running, request, key=_place)
        plan.requests.append(request)
        plan.num_new.append(count)
        plan.starts.append(RowStart.of(request))
        return count

    def _seal(self, plan: StepPlan) -> StepPlan:
        """Fill in what follows from the choice of requests, and advance them."""
        requests, num_new = plan.requests, plan.num_new
        plan.num_tokens = sum(num_new)
        if plan.num_tokens != len(num_new):  # one-token rows first
            order = sorted(range(len(num_new)), key=lambda i: num_new[i] != 1)
            requests[:] = [requests[i] for i in order]
            num_new[:] = [num_new[i] for i in order]
        plan.rows = [r.row for r in requests]
        plan.num_computed = [r.num_computed for r in requests]
        sampled = plan.sampled
        for index, (request, count) in enumerate(zip(requests, num_new, strict=True)):
            request.num_computed += count
            request.num_in_flight += 1
            if request.num_computed == len(request.token_ids) + request.num_pending:
                if request.pooling is not None:
                    plan.pooled.append(index)
                    continue
                request.num_pending += 1
                sampled.append(index)
                if request.forks:  # the next plan runs after this one, when the prompt is in the cache
                    self._enqueue_forks(request)
        if self.waiting.contended:
            self.waiting.charge(requests[index] for index in sampled)
        return plan

    def _chunk_limit(self, budget: int) -> int:
        threshold = self.config.long_prefill_token_threshold
        return min(budget, threshold) if threshold and self.config.enable_chunked_prefill else budget

    def _make_room(self, request: Request, count: int, plan: StepPlan) -> bool:
        """Find blocks for ``count`` more tokens; preempt from the end of ``running`` if it must be.

        False if the request itself was preempted, or has to wait for blocks of requests that are about to leave.
        """
        while not self.kv.grow(request, count, plan):
            self._pressed = True
            if self._reclaim_held():
                continue
            if self.leaving:
                return False
            victim = self.running[-1]
            self._preempt(victim, plan)
            if victim is request:
                return False
        return True

    def _preempt(self, victim: Request, plan: StepPlan) -> None:
        """Take a request's blocks; it will be recomputed, output included, when there is room again."""
        if victim in plan.requests:  # its updates may stay: nobody enters its row in this step
            index = plan.requests.index(victim)
            del plan.requests[index], plan.num_new[index]
        self.running.pop()
        self.num_preemptions += 1
        self._put_back(victim)

    def _put_back(self, request: Request) -> None:
        """A request that ran is to wait again, without blocks; its caller takes it off ``running``."""
        self.waiting.stopped(request)
        self.kv.free(request)
        self._free_rows.append(request.row)
        request.row = -1
        request.num_computed = request.num_registered = 0
        request.num_stale = request.num_in_flight
        request.num_preemptions += 1
        self._enqueue(request)

    # -- results -------------------------------------------------------------------------------------------------

    def update(self, plan: StepPlan, result: StepResult) -> list[EngineOutput]:
        """Apply a step's result: append tokens, stop what is done, make full blocks findable, free what has left."""
        outputs: list[EngineOutput] = []
        block_size = self.kv.block_size
        any_finished = False
        sampled = dict(zip(plan.sampled, range(len(plan.sampled)), strict=True))
        failed, complete = result.failed, result.complete
        pooled = dict(zip(plan.pooled, result.pooled, strict=True))
        for index, request in enumerate(plan.requests):
            request.num_in_flight -= 1
            sample = sampled.get(index, -1)
            if sample >= 0:
                request.num_pending -= 1
            if request.status == RequestStatus.FINISHED:
                if request.num_in_flight == 0:
                    self._leave(request)
                continue
            if request.num_stale:
                request.num_stale -= 1
            else:
                num_done = plan.num_computed[index] + plan.num_new[index]
                if num_done // block_size > request.num_registered:
                    self.kv.register(request, num_done)
            prompt_logprobs = None
            if index in result.prompt_logprobs:
                prompt_logprobs = request.take_prompt_logprobs(plan.num_computed[index], result.prompt_logprobs[index])
            if sample < 0:
                if prompt_logprobs:
                    outputs.append(EngineOutput(request.request_id, [], prompt_logprobs=prompt_logprobs))
                if index in pooled:
                    outputs.append(self._pool(request, pooled[index]))
                    any_finished = True
                continue
            if failed and sample in failed:
                self.kv.distrust(request)  # what made it fail may be in its keys and values
                self._finish(request, "error")
                outputs.append(EngineOutput(request.request_id, [], "error", failed[sample]))
                any_finished = True
                continue
            token = result.token_ids[sample]
            request.token_ids.append(token)
            output = EngineOutput(request.request_id, [token], num_cached_tokens=request.num_cached_tokens)
            if sample in result.logprobs:
                output.logprobs = [result.logprobs[sample]]
            output.prompt_logprobs = prompt_logprobs
            if complete and sample in complete:
                output.finish_reason = "stop"
            else:
                check_stop(request, token, output)
            if output.finish_reason is not None:
                self._finish(request, output.finish_reason)
                any_finished = True
            outputs.append(output)
            if request.num_faults:
                self.suspects.clear(request)
        if any_finished:
            self._drop_finished()
        if self._most_tokens < self.config.max_num_batched_tokens and outputs:  # more again, but never without progress
            self._most_tokens = min(self._most_tokens * REGROWTH, self.config.max_num_batched_tokens)
        return outputs

    def _pool(self, request: Request, vector: Array) -> EngineOutput:
        """A pooling request has what it came for."""
        if not np.isfinite(vector).all():
            self.kv.distrust(request)
            self._finish(request, "error")
            return EngineOutput(request.request_id, [], "error", "the vector is not of finite numbers")
        self._finish(request, "stop")
        return EngineOutput(request.request_id, [], "stop", num_cached_tokens=request.num_cached_tokens, pooled=vector)

    def fail(self, plans: Sequence[StepPlan], message: str, out_of_memory: bool = False) -> list[EngineOutput]:
        """The first of these plans raised, and the others were made on top of it: all are void, and none is under way.

        Their requests are computed again, those of the first as `Suspects`. Whoever has failed alone too often ends
        with an error. Where memory ran out, steps have half the tokens for a while, and nobody ends as long as that
        can help.
        """
        accused = [request for request in plans[0].requests if request.status == RequestStatus.RUNNING]
        for plan in plans:
            for request in plan.requests:
                request.num_in_flight -= 1
            for index in plan.sampled:
                plan.requests[index].num_pending -= 1
        can_shrink = out_of_memory and self.config.enable_chunked_prefill and plans[0].num_tokens > 1
        reached = {each.request_id: count for each, count in zip(plans[0].requests, plans[0].num_computed, strict=True)}
        guilty = self.suspects.accuse(sorted(accused, key=_place), reached) and not can_shrink
        for request in {request.request_id: request for plan in plans for request in plan.requests}.values():
            request.num_stale = 0
            if request.status == RequestStatus.RUNNING:
                if guilty and request is accused[0]:
                    self.kv.distrust(request)
                self._put_back(request)
            elif request.finished:
                self._leave(request)
        self.running = [request for request in self.running if request.status == RequestStatus.RUNNING]
        if can_shrink:
            self._most_tokens = plans[0].num_tokens // 2
        if not guilty:
            self.num_retries += len(accused)
            return []
        if out_of_memory:  # not for want of smaller steps
            self._most_tokens = self.config.max_num_batched_tokens
        self._finish(accused[0], "error")
        return [EngineOutput(accused[0].request_id, [], "error", message)]

    # -- bookkeeping ---------------------------------------------------------------------------------------------

    def _enqueue(self, request: Request) -> None:
        request.status = RequestStatus.WAITING
        self.num_waiting += 1
        if not request.num_faults:  # else its group knows it
            self.waiting.push(request)

    def _enqueue_forks(self, parent: Request) -> None:
        for fork in parent.forks.values():
            self._enqueue(fork)
        parent.forks.clear()

    def _leave_parent(self, request: Request) -> None:
        """The request has its own blocks, or will never want any: it no longer needs the parent's."""
        parent, request.fork_of = request.fork_of, None
        if parent is not None:
            parent.num_forks_waiting -= 1
            self._free_if_forsaken(parent)

    def _finish(self, request: Request, reason: str) -> None:
        """Mark as finished. Its blocks go back when no plan under way names them; `_drop_finished` must follow."""
        self._enqueue_forks(request)  # they compute the prompt themselves
        parent = request.fork_of
        dormant = parent is not None and parent.forks.pop(request.request_id, None) is not None
        was, request.status = request.status, RequestStatus.FINISHED
        if was == RequestStatus.RUNNING:
            self.waiting.stopped(request)
        elif not dormant:
            self.num_waiting -= 1
            if not request.num_faults:
                self.waiting.drop(request)
        if request.num_faults:
            self.suspects.clear(request)
        request.finish_reason = reason
        del self.requests[request.request_id]
        self._leave_parent(request)
        self.leaving[request.request_id] = request
        if request.num_in_flight == 0:
            self._leave(request)

    def _drop_finished(self) -> None:
        self.running = [request for request in self.running if request.status != RequestStatus.FINISHED]

    def _leave(self, request: Request) -> None:
        """No plan under way names the request any more: give back its row and blocks."""
        del self.leaving[request.request_id]
        if request.row >= 0:
            self._free_rows.append(request.row)
            request.row = -1
        self.held[request.request_id] = request
        self._free_if_forsaken(request)

    def _free_if_forsaken(self, request: Request) -> None:
        """Free the blocks of a finished request that nobody will fork from."""
        if request.request_id in self.held and not request.held and request.num_forks_waiting == 0:
            del self.held[request.request_id]
            self.kv.free(request)

    def _reclaim_held(self) -> bool:
        """Free the blocks of the request that has been held longest: its forks will compute for themselves."""
        for request_id, request in self.held.items():
            del self.held[request_id]
            self.kv.free(request)
            return True
        return False
