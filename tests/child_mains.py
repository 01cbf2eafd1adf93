"""What engine processes run in tests: an executor without a model, watched by the invariant checker, with faults."""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import Any

from fake_executor import FakeExecutor, FakeHandle

from nanovllm.config import EngineConfig
from nanovllm.engine.channel import Channel
from nanovllm.engine.core import EngineCore
from nanovllm.engine.core_process import run
from nanovllm.engine.face import make_core
from nanovllm.engine.invariants import InvariantChecker
from nanovllm.engine.messages import Ready
from nanovllm.engine.plan import StepPlan
from nanovllm.engine.wire import encode_message
from nanovllm.errors import ModelError, ParameterError


def connection() -> socket.socket:
    return socket.socket(fileno=int(sys.argv[1]))


def serve(executor: Any) -> None:
    def watched(config: EngineConfig) -> tuple[EngineConfig, EngineCore]:
        config, core = make_core(config, executor)
        core.checker = InvariantChecker(core.scheduler)
        return config, core

    sys.exit(run(connection(), watched))


def fake() -> None:
    serve(FakeExecutor(num_blocks=200, seconds=0.002))


def slow() -> None:
    """A long answer takes seconds."""
    serve(FakeExecutor(num_blocks=200, seconds=0.02))


def failing_step() -> None:
    serve(FakeExecutor(num_blocks=200, seconds=0.002, failing_steps=frozenset({3})))


def poisonable() -> None:
    """Every step with a request of seed 7 fails from position 8 on."""
    serve(FakeExecutor(num_blocks=200, seconds=0.002, poison={7: 8}))


class Lost(FakeExecutor):
    def recover(self) -> None:
        raise RuntimeError("illegal memory access")


def lost_device() -> None:
    serve(Lost(num_blocks=200, seconds=0.002, failing_steps=frozenset({5})))


class Buggy(FakeExecutor):
    def submit(self, plan: StepPlan) -> FakeHandle:
        if plan.step == 3:
            raise RuntimeError("a bug")
        return super().submit(plan)


def buggy() -> None:
    serve(Buggy(num_blocks=200, seconds=0.002))


class Stuck(FakeExecutor):
    def submit(self, plan: StepPlan) -> FakeHandle:
        if plan.step == 3:
            time.sleep(600)
        return super().submit(plan)


def stuck() -> None:
    """A step that does not end."""
    serve(Stuck(num_blocks=200, seconds=0.002))


def small_cache() -> None:
    serve(FakeExecutor(num_blocks=9, seconds=0.002))


def cannot_load() -> None:
    def refuse(config: EngineConfig) -> Any:
        raise ModelError("weights.safetensors is a picture of a cat")

    sys.exit(run(connection(), refuse))


def no_memory() -> None:
    def refuse(config: EngineConfig) -> Any:
        raise ParameterError("too much", "kv_cache_memory_bytes", 10**15)

    sys.exit(run(connection(), refuse))


def missing_library() -> None:
    def fail(config: EngineConfig) -> Any:
        raise ImportError("libcudart.so.99")

    sys.exit(run(connection(), fail))


def slow_to_load() -> None:
    def load(config: EngineConfig) -> Any:
        time.sleep(600)

    sys.exit(run(connection(), load))


def bad_frame() -> None:
    """Says it is ready, and then something that is no message."""
    link = connection()
    channel = Channel(link)
    channel.send(encode_message(Ready(128, 200)))
    time.sleep(0.3)
    channel.send(b"nonsense")
    time.sleep(600)


def exits() -> None:
    """Ends at once, without a word."""
    os._exit(7)
