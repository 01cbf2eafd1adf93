"""The engine's process under load: no model, the invariant checker, and steps that fail now and then."""

from __future__ import annotations

import json
import os
import random
import socket
import sys
from dataclasses import dataclass, field
from typing import Any

from fake_executor import FakeExecutor, FakeHandle

from nanovllm.config import EngineConfig
from nanovllm.engine.core import EngineCore
from nanovllm.engine.core_process import run
from nanovllm.engine.face import make_core
from nanovllm.engine.invariants import InvariantChecker
from nanovllm.engine.plan import StepPlan

VARIABLE = "NANOVLLM_LOAD_ENGINE"  # `EngineSettings` as JSON


@dataclass
class EngineSettings:
    """How the engine behaves.

    Attributes:
        seconds: that a step takes.
        num_blocks: of the KV cache.
        fault_rate: share of the steps that raise.
        check: whether the invariant checker watches.
    """

    seconds: float = 0.005
    num_blocks: int = 4000
    fault_rate: float = 0.0
    check: bool = True


@dataclass
class Flaky(FakeExecutor):
    """Some of its steps raise, half of them for want of memory."""

    fault_rate: float = 0.0
    chance: random.Random = field(default_factory=lambda: random.Random(0))

    def submit(self, plan: StepPlan) -> Any:
        handle = super().submit(plan)
        self.plans.clear()
        self.lengths = {plan.step: self.lengths[plan.step]}
        return FailedStep(plan, self) if self.chance.random() < self.fault_rate else handle


class FailedStep(FakeHandle):
    def result(self) -> Any:
        chance = self.executor.chance  # type: ignore[attr-defined]
        raise (MemoryError if chance.random() < 0.5 else RuntimeError)("on purpose")


def main() -> None:
    settings = EngineSettings(**json.loads(os.environ.get(VARIABLE, "{}")))

    def load(config: EngineConfig) -> tuple[EngineConfig, EngineCore]:
        executor = Flaky(num_blocks=settings.num_blocks, seconds=settings.seconds, fault_rate=settings.fault_rate)
        config, core = make_core(config, executor)
        if settings.check:
            core.checker = InvariantChecker(core.scheduler)
        return config, core

    sys.exit(run(socket.socket(fileno=int(sys.argv[1])), load))


def expected_tokens(seed: int, prompt_length: int, count: int) -> list[int]:
    """What the engine answers."""
    return [FakeExecutor().token(seed, position) for position in range(prompt_length, prompt_length + count)]
