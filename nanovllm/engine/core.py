"""The engine's loop: plan, submit, wait for the oldest step, update. Tokens in, tokens out; no text, no tensors."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Protocol

from nanovllm.config import EngineConfig
from nanovllm.engine.inspection import Watch
from nanovllm.engine.invariants import InvariantChecker
from nanovllm.engine.plan import EngineOutput, StepPlan, StepResult
from nanovllm.engine.request import Request
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.stats import StepMeter
from nanovllm.engine.structured import GrammarCompiler
from nanovllm.errors import EngineDeadError, StepError

logger = logging.getLogger(__name__)


class Handle(Protocol):
    """A submitted step."""

    def result(self) -> StepResult:
        """Wait for the step. Raises what the step raised; a MemoryError if memory did not suffice."""


class Executor(Protocol):
    """Where the model runs: in this process, in others, on other hosts. Steps run in the order of submission."""

    num_blocks: int

    @property
    def grammars(self) -> GrammarCompiler | None:
        """Compiles grammars for constrained outputs; None if it does not follow any."""

    def submit(self, plan: StepPlan) -> Handle: ...

    def recover(self) -> None:
        """A step has raised, and none is under way: make ready for the next. Raises if there can be none."""

    def shutdown(self) -> None: ...


class EngineCore:
    """Scheduler and executor in step.

    Up to ``max_steps_in_flight`` plans are under way, so that the next step is planned while one runs.
    """

    def __init__(self, config: EngineConfig, executor: Executor) -> None:
        self.executor = executor
        self.scheduler = Scheduler(
            config.scheduler, executor.num_blocks, config.cache.block_size, config.cache.enable_prefix_caching
        )
        self.max_steps_in_flight = config.scheduler.max_steps_in_flight
        self.meter = StepMeter(self.scheduler)
        self.checker: InvariantChecker | None = None  # set by tests
        self.watch: Watch | None = None  # while somebody watches
        self._budget = config.scheduler.max_num_batched_tokens
        self._in_flight: deque[tuple[StepPlan, Handle]] = deque()
        self._undelivered: list[EngineOutput] = []

    def add(self, request: Request, priority: int = 0, forks: Sequence[Request] = ()) -> None:
        """Queue a request; see `Scheduler.add`."""
        if request.guide is not None and self.executor.grammars is not None:
            self.executor.grammars.prepare(request.guide.grammar)  # it may be done before the first step with it
        self.meter.queued((request, *forks))
        self.scheduler.add(request, priority, forks)

    def finish(self, request_ids: Iterable[str], reason: str) -> None:
        """End requests early. A step under way is not interrupted; what it yields for them is dropped."""
        self.scheduler.finish(request_ids, reason)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight) or bool(self._undelivered)

    def step(self) -> list[EngineOutput]:
        """Complete one step.

        A step that raises is a fault of its requests, and they are computed again (`Scheduler.fail`).

        Raises:
            StepError: a request has failed too often, alone. It has ended; the next call reports it with finish_reason
                "error". All others go on.
            EngineDeadError: a step has raised, and the executor takes no further ones. Anything else is a fault of the
                engine itself.
        """
        outputs, self._undelivered = self._undelivered, []
        if outputs:
            return outputs
        while len(self._in_flight) < self.max_steps_in_flight:
            plan = self.scheduler.schedule()
            if plan is None:
                break
            self.meter.planned(plan)
            if self.watch is not None:
                self.watch.planned(plan)
            if self.checker is not None:
                self.checker.planned(plan)
            self._in_flight.append((plan, self.executor.submit(plan)))
        if not self._in_flight:
            if self.scheduler.has_work:
                raise RuntimeError(f"requests wait but nothing can be scheduled: {self.scheduler.requests}")
            return []
        plan, handle = self._in_flight[0]
        try:
            result = handle.result()
        except Exception as error:
            self._recover(error)
            return []
        self._in_flight.popleft()
        outputs = self.scheduler.update(plan, result)
        if self.checker is not None:
            self.checker.updated()
        return outputs

    def _recover(self, error: Exception) -> None:
        """The oldest step failed: wait for those behind it, which may build on its results, and drop them all."""
        plans = []
        for number, (plan, handle) in enumerate(self._in_flight):
            if number > 0:
                with suppress(Exception):  # void either way
                    handle.result()
            plans.append(plan)
        self._in_flight.clear()
        try:
            self.executor.recover()
        except Exception as fault:
            raise EngineDeadError(f"a step failed ({_told(error)}), and the device with it: {_told(fault)}") from error
        new = not self.scheduler.suspects  # else it is the same fault once more, on the way to who causes it
        out_of_memory = isinstance(error, MemoryError)
        self.meter.failed("out_of_memory" if out_of_memory else "step_failed")
        self._undelivered = self.scheduler.fail(plans, _told(error), out_of_memory)
        if self._undelivered:
            raise StepError(f"a step of the model failed, again and again: {error}") from error
        if new:
            count = len(plans[0].requests)
            logger.warning("A step of %d requests failed; they are computed again.", count, exc_info=error)

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False while any request holds blocks."""
        return self.scheduler.kv.pool.reset_cache()

    def inspect(self, on: bool) -> None:
        """Record what steps do, beginning with the state as it is now, or stop that."""
        if self.watch is None and on:
            self.watch = Watch(self.scheduler, self._budget)
        elif self.watch is not None and on:
            self.watch.renew()
        elif self.watch is not None:
            self.watch.close()
            self.watch = None

    def shutdown(self) -> None:
        """Stop the executor. Idempotent."""
        self.executor.shutdown()


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
