"""What an engine does, in numbers: counted by the core step by step, summed up where requests come from.

core:  StepMeter --StepStats, with each step's outputs-->  EngineStats --StepRecord--> observers
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from nanovllm.engine.output import AnyOutput
    from nanovllm.engine.plan import EngineOutput, StepPlan
    from nanovllm.engine.request import Request
    from nanovllm.engine.scheduler import Scheduler
    from nanovllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

LOG_INTERVAL = 10.0  # seconds
# A step raised; memory did not suffice for one; the engine's process ended by itself; a client was left because it took
# nothing, or sent nothing, for too long; a connection was refused because there were too many.
FAULTS = ("step_failed", "out_of_memory", "engine_died", "client_stalled", "connections_full")


@dataclass(slots=True)
class Admission:
    """A request has entered a row of the batch, for the first time or again after preemption."""

    request_id: str
    queued_ts: float
    scheduled_ts: float
    num_preemptions: int = 0


@dataclass(slots=True)
class StepStats:
    """The core after a step. Counts are those since the last one; times are seconds of the monotonic clock.

    Attributes:
        timestamp: when the step had ended.
        num_running, num_waiting: requests in the batch, and in the queue.
        kv_cache_usage: share of the blocks that requests hold, 0 to 1; what is only cached counts as free.
        num_steps, num_tokens: steps, and tokens they computed.
        prompt_tokens: of the prompts that were admitted, cached tokens included.
        prefix_cache_queries, prefix_cache_hits: prompt tokens looked up in the prefix cache, and found.
        num_preemptions: requests put back into the queue because blocks ran short.
        num_retries: requests computed again because their step raised.
        faults: names of the faults that were met, in order.
        admissions: requests that were admitted.
        tenants: of tenants that have a name and requests: how many are in the batch, and how many in the queue.
    """

    timestamp: float = 0.0
    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_steps: int = 0
    num_tokens: int = 0
    prompt_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    num_retries: int = 0
    faults: list[str] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    tenants: dict[str, tuple[int, int]] = field(default_factory=dict)


class StepMeter:
    """Counts what a core does. A step that admits nobody costs a few additions."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._stats = StepStats()
        self._num_preemptions = self._num_retries = 0  # when last taken

    def queued(self, requests: Iterable[Request]) -> None:
        """Requests have arrived."""
        now = time.monotonic()
        for request in requests:
            request.queued_ts = now

    def planned(self, plan: StepPlan) -> None:
        """A step was planned."""
        stats = self._stats
        stats.num_steps += 1
        stats.num_tokens += plan.num_tokens
        if plan.starts:
            rows = {start.row for start in plan.starts}
            self._admitted([request for request in plan.requests if request.row in rows])

    def failed(self, fault: str) -> None:
        """A step has raised."""
        self._stats.faults.append(fault)

    def take(self) -> StepStats:
        """What has happened since the last call."""
        scheduler, stats = self._scheduler, self._stats
        pool = scheduler.kv.pool
        stats.timestamp = time.monotonic()
        stats.num_running, stats.num_waiting = len(scheduler.running), scheduler.num_waiting
        stats.kv_cache_usage = 1.0 - pool.num_free / pool.num_usable
        stats.tenants = scheduler.waiting.tenants()
        stats.num_preemptions = scheduler.num_preemptions - self._num_preemptions
        stats.num_retries = scheduler.num_retries - self._num_retries
        self._num_preemptions, self._num_retries = scheduler.num_preemptions, scheduler.num_retries
        self._stats = StepStats()
        return stats

    def _admitted(self, requests: list[Request]) -> None:
        stats, now = self._stats, time.monotonic()
        for request in requests:
            stats.admissions.append(Admission(request.request_id, request.queued_ts, now, request.num_preemptions))
            if request.num_preemptions:
                continue
            stats.prompt_tokens += request.num_prompt_tokens
            if self._scheduler.kv.enable_prefix_caching and not request.params.skip_reading_prefix_cache:
                stats.prefix_cache_queries += request.num_prompt_tokens
                stats.prefix_cache_hits += request.num_cached_tokens


@dataclass(slots=True)
class StepRecord:
    """A step as observers see it.

    Attributes:
        stats: what the core says of it.
        generation_tokens: tokens generated.
        first_token_times: seconds from arrival to first token, of outputs that had theirs in this step.
        intervals: (seconds since the output's last token, number of outputs), of the others.
    """

    stats: StepStats
    generation_tokens: int
    first_token_times: list[float]
    intervals: list[tuple[float, int]]


class Observer(Protocol):
    """Sees what happens to an engine. Called where its outputs are handled: be brief."""

    def step(self, record: StepRecord) -> None:
        """A step has ended, or the queue has changed without one."""

    def finished(self, output: AnyOutput, params: SamplingParams) -> None:
        """A request has ended, in whatever way; ``output`` is its last."""


class EngineStats:
    """The latest known state of an engine and its totals, over restarts.

    Attributes:
        observers: told of every step and of every request's end.
        num_running, num_waiting, kv_cache_usage: after the last step.
        steps, prompt_tokens, generation_tokens, prefix_cache_queries, prefix_cache_hits, num_preemptions, num_retries:
            totals.
        faults: how often each fault was met, by its name in `FAULTS`.
    """

    def __init__(self) -> None:
        self.observers: list[Observer] = []
        self.num_running = 0
        self.num_waiting = 0
        self.kv_cache_usage = 0.0
        self.steps = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self.num_preemptions = 0
        self.num_retries = 0
        self.num_timeouts = 0  # requests that had not ended by their deadline
        self.tenants: dict[str, tuple[int, int]] = {}
        self.faults = Counter(dict.fromkeys(FAULTS, 0))
        self._last_fault_ts: float | None = None
        self._last_step_ts = time.monotonic()
        # Outputs under way, by their ids in the engine: the time of the last token; before the first, that of arrival,
        # as a negative number.
        self._times: dict[str, float] = {}

    def last_step_age(self) -> float:
        """Seconds since the engine last reported a step; since its start, if it never did."""
        return time.monotonic() - self._last_step_ts

    def fault(self, name: str) -> None:
        """A fault was met; ``name`` is one of `FAULTS`. Whoever calls this logs it."""
        self.faults[name] += 1
        self._last_fault_ts = time.monotonic()

    def last_fault_age(self) -> float | None:
        """Seconds since the last fault; None: there was none."""
        return None if self._last_fault_ts is None else time.monotonic() - self._last_fault_ts

    def add(self, output_ids: Iterable[str], arrival_ts: float) -> None:
        """Outputs (by their ids in the engine) are expected from now on."""
        self._times.update(dict.fromkeys(output_ids, -arrival_ts))

    def forget(self, output_ids: Iterable[str]) -> None:
        """Outputs have ended early."""
        for output_id in output_ids:
            self._times.pop(output_id, None)

    def step(self, outputs: Sequence[EngineOutput], stats: StepStats) -> None:
        """Take what a step gave."""
        self.num_running, self.num_waiting = stats.num_running, stats.num_waiting
        self.kv_cache_usage = stats.kv_cache_usage
        self.tenants = stats.tenants
        self.steps += stats.num_steps
        self.prompt_tokens += stats.prompt_tokens
        self.prefix_cache_queries += stats.prefix_cache_queries
        self.prefix_cache_hits += stats.prefix_cache_hits
        self.num_preemptions += stats.num_preemptions
        self.num_retries += stats.num_retries
        for name in stats.faults:
            self.fault(name)
        if stats.num_steps:
            self._last_step_ts = stats.timestamp
        record = self._record(outputs, stats)
        self.generation_tokens += record.generation_tokens
        for observer in self.observers:
            try:
                observer.step(record)
            except Exception:  # whoever watches must not stop what is watched
                logger.exception("An observer of the engine failed.")

    def finished(self, output: AnyOutput, params: SamplingParams) -> None:
        """A request has ended."""
        for observer in self.observers:
            try:
                observer.finished(output, params)
            except Exception:
                logger.exception("An observer of the engine failed.")

    def reset(self) -> None:
        """The engine behind has gone; whatever was under way has ended."""
        self._times.clear()
        self._last_step_ts = time.monotonic()
        self.step((), StepStats(self._last_step_ts))

    def _record(self, outputs: Sequence[EngineOutput], stats: StepStats) -> StepRecord:
        """Most outputs had their last token at the same time, one step ago: they are counted, not listed."""
        now, times = stats.timestamp, self._times
        groups: dict[float, int] = {}  # time of the last token -> outputs
        num_tokens = 0
        for output in outputs:
            output_id = output.request_id
            previous = times.get(output_id)
            if output.new_token_ids:
                num_tokens += len(output.new_token_ids)
                if previous is not None:
                    groups[previous] = groups.get(previous, 0) + 1
                    times[output_id] = now
            if output.finish_reason is not None:
                times.pop(output_id, None)
        record = StepRecord(stats, num_tokens, [], [])
        for previous, count in groups.items():
            if previous < 0:
                record.first_token_times += [now + previous] * count
            else:
                record.intervals.append((now - previous, count))
        return record


class StatsLog:
    """An `Observer` that sums up for a line in the log. Its owner calls `report` when it is `due`, or by a clock."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._since = 0.0  # the first step since the last line; 0.0: there was none
        self._stats = StepStats()  # the last
        self._prompt_tokens = self._generation_tokens = self._queries = self._hits = 0

    def step(self, record: StepRecord) -> None:
        stats = record.stats
        if not stats.num_steps and not self._since:  # nothing but the queue has changed
            return
        self._since = self._since or stats.timestamp
        self._stats = stats
        self._prompt_tokens += stats.prompt_tokens - stats.prefix_cache_hits
        self._generation_tokens += record.generation_tokens
        self._queries += stats.prefix_cache_queries
        self._hits += stats.prefix_cache_hits

    def finished(self, output: AnyOutput, params: SamplingParams) -> None:
        pass

    @property
    def due(self) -> bool:
        """Whether the work to report began long enough ago."""
        return bool(self._since) and time.monotonic() - self._since >= LOG_INTERVAL

    def report(self) -> bool:
        """Log what was done since the last line; False if nothing was."""
        if not self._since:
            return False
        seconds, stats = max(time.monotonic() - self._since, 1e-3), self._stats
        logger.info(
            "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, Running: %d reqs, "
            "Waiting: %d reqs, GPU KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%",
            self._prompt_tokens / seconds,
            self._generation_tokens / seconds,
            stats.num_running,
            stats.num_waiting,
            100 * stats.kv_cache_usage,
            100 * self._hits / max(self._queries, 1),
        )
        self._clear()
        return True
