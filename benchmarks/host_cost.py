"""Host cost of an engine step: planning, bookkeeping and making outputs, with an executor that computes nothing.

No torch is loaded. The engine is the real one, the tokenizer that of the model in the box. What is measured is a step
in which every running request decodes one token, after warming up; then the whole life of short requests, from
`add_request` to the final output, with few and with many of them waiting.

    python benchmarks/host_cost.py
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from report import RESULTS, print_table, write_results

from nanovllm import EngineArgs, LLMEngine, RequestOutputKind, SamplingParams
from nanovllm.engine.plan import StepPlan, StepResult

CONTEXT = 8192
BLOCK_SIZE = 16
KINDS = {"final only": RequestOutputKind.FINAL_ONLY, "streaming": RequestOutputKind.DELTA}
PHASES = ("schedule", "update", "output")


class NoModel:
    """An executor whose tokens are drawn from a list; both handle and executor."""

    grammars = None

    def __init__(self, num_blocks: int, tokens: list[int]) -> None:
        self.num_blocks = num_blocks
        self._tokens = itertools.cycle(tokens)
        self.plan = StepPlan(0)  # the last one

    def submit(self, plan: StepPlan) -> NoModel:
        self.plan = plan
        return self

    def result(self) -> StepResult:
        return StepResult(list(itertools.islice(self._tokens, len(self.plan.sampled))))

    def recover(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


def make_engine(running: int, model: str) -> tuple[LLMEngine, NoModel]:
    """An engine with room for ``running`` requests of the full context."""
    gc.collect()  # what the last one left is not this one's cost
    args = EngineArgs(
        model=model,
        load_format="dummy",
        disable_log_stats=True,
        quantization=None,
        block_size=BLOCK_SIZE,
        max_num_seqs=running,
        max_num_batched_tokens=1 << 20,
        hf_overrides={"max_position_embeddings": CONTEXT},
    )
    config = args.build()
    tokens = list(range(300, min(2000, config.model.vocab_size)))  # ordinary text, past single bytes
    executor = NoModel(running * (CONTEXT // BLOCK_SIZE) + 1, tokens)
    return LLMEngine(config, executor), executor


def add_requests(engine: LLMEngine, count: int, prompt_len: int, max_tokens: int, kind: RequestOutputKind) -> None:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, output_kind=kind)
    vocab = engine.model_config.vocab_size
    for number in range(count):
        prompt = [(number * 7919 + position * 31) % vocab for position in range(prompt_len + number % 16)]
        engine.add_request(str(number), prompt, params)


def stopwatch(engine: LLMEngine) -> dict[str, list[float]]:
    """Make the engine note the milliseconds each phase of every step takes, in the lists returned."""
    times: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def timed(phase: str, function: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        value = function(*args)
        times[phase].append((time.perf_counter() - start) * 1e3)
        return value

    scheduler, output = engine.core.scheduler, engine.output
    scheduler.schedule = partial(timed, "schedule", scheduler.schedule)  # type: ignore[method-assign]
    scheduler.update = partial(timed, "update", scheduler.update)  # type: ignore[method-assign]
    output.process = partial(timed, "output", output.process)  # type: ignore[method-assign]
    return times


def decode_step(running: int, waiting: int, history: int, kind: str, steps: int, model: str) -> dict[str, Any]:
    """Cost of a step of ``running`` decodes, with ``waiting`` requests in the queue and ``history`` tokens each."""
    engine, executor = make_engine(running, model)
    add_requests(engine, running + waiting, history, CONTEXT - history - 16, KINDS[kind])
    while executor.plan.num_tokens != running or len(executor.plan.rows) != running:  # until all prompts are computed
        engine.step()
    for _ in range(20):
        engine.step()
    phases = stopwatch(engine)
    totals = []
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        totals.append((time.perf_counter() - start) * 1e3)
    assert executor.plan.num_tokens == running, "a request ended while it was measured"
    engine.shutdown()
    return {
        "running": running,
        "waiting": waiting,
        "history": history,
        "outputs": kind,
        **{f"{phase}_ms": statistics.median(times) for phase, times in phases.items()},
        "step_ms": statistics.median(totals),
        "step_p99_ms": sorted(totals)[int(len(totals) * 0.99)],
        "us_per_request": statistics.median(totals) * 1e3 / running,
    }


def whole_life(count: int, running: int, kind: str, model: str) -> dict[str, Any]:
    """Cost of ``count`` requests that arrive together, from `add_request` to the final output."""
    engine, _ = make_engine(running, model)
    start = time.perf_counter()
    add_requests(engine, count, 64, 16, KINDS[kind])
    added = time.perf_counter()
    while engine.has_unfinished_requests():
        engine.step()
    end = time.perf_counter()
    engine.shutdown()
    return {
        "requests": count,
        "running": running,
        "outputs": kind,
        "add_us": (added - start) * 1e6 / count,
        "run_us": (end - added) * 1e6 / count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="steps measured per row")
    parser.add_argument("--running", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--model", default="demo", help="whose tokenizer and vocabulary are used")
    parser.add_argument("--output", type=Path, default=RESULTS / "host_cost.json")
    options = parser.parse_args()

    most = options.running[-1]
    cases = [(running, 0, 128) for running in options.running]
    cases += [(running, options.waiting, 128) for running in options.running]
    cases += [(most, 0, 4096)]
    steps = [decode_step(*case, kind, options.steps, options.model) for case in cases for kind in KINDS]
    print_table([name.removesuffix("_ms") for name in steps[0]], [list(step.values()) for step in steps])
    print("milliseconds: medians, and the 99th percentile of a step\n")
    few = min(most, 256)
    lives = [whole_life(count, few, kind, options.model) for count in (few, options.waiting) for kind in KINDS]
    print_table(list(lives[0]), [list(life.values()) for life in lives])
    print("microseconds per request of 64 prompt and 16 output tokens\n")
    assert "torch" not in sys.modules, "the host side must not need torch"
    write_results(options.output, decode_step=steps, whole_life=lives)


if __name__ == "__main__":
    logging.getLogger("nanovllm").setLevel(logging.ERROR)
    main()
