"""The inspector: what it shows is what the scheduler and its block pool hold, in frames and on the page itself."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest
from engine_processes import LONG, collect, engine, quiet, streams_in_flight
from fake_executor import FakeExecutor, engine_config, make_request

from nanovllm.engine.core import EngineCore
from nanovllm.engine.inspection import MOST_UNREAD, Viewers, _head
from nanovllm.engine.invariants import InvariantChecker
from nanovllm.engine.scheduler import Scheduler

Json = dict[str, Any]


class Mirror:
    """What a page knows after the frames it has got."""

    def __init__(self) -> None:
        self.blocks: list[tuple[int, int]] = []  # references, cached
        self.tables: dict[str, list[int]] = {}
        self.decodes: list[str] = []
        self.records: list[Json] = []

    def take(self, frame: bytes) -> None:
        said = json.loads(frame)
        if "full" in said:
            full = said["full"]
            self.blocks = [(refs, cached) for count, refs, cached in full["blocks"] for _ in range(count)]
            self.tables = {each["name"]: each["table"] for each in full["requests"]}
        for record in said.get("records", ()):
            self.records.append(record)
            for name, _ in record.get("gone", ()):
                del self.tables[name]
            for start in record.get("starts", ()):
                self.tables[start["name"]] = []
            for name, first, blocks in record.get("tables", ()):
                assert first == len(self.tables[name])
                self.tables[name] += blocks
            self.decodes = record.get("decodes", self.decodes)
            for block, refs, cached in record.get("blocks", ()):
                self.blocks[block] = (refs, cached)


def truth(scheduler: Scheduler) -> tuple[list[tuple[int, int]], dict[str, list[int]]]:
    """What the scheduler holds: its blocks, and the tables of its requests by their names."""
    pool = scheduler.kv.pool
    blocks = [(refs, int(each is not None)) for refs, each in zip(pool.ref_count, pool.hash_of, strict=True)]
    holders = [*scheduler.running, *scheduler.leaving.values(), *scheduler.held.values()]
    names = {each.request_id: str(each.key[1]) + (f".{each.key[2]}" if each.key[2] else "") for each in holders}
    return blocks, {names[each.request_id]: list(each.blocks) for each in holders if each.blocks}


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_frames_tell_exactly_what_the_scheduler_holds(seed: int, in_flight: int):
    """Random arrivals, forks, aborts and preemptions in a tiny cache; somebody comes to watch in the middle of it."""
    draw = random.Random(seed)
    executor = FakeExecutor(num_blocks=24)
    core = EngineCore(engine_config(in_flight=in_flight, max_num_batched_tokens=16, threshold=7), executor)
    core.checker = InvariantChecker(core.scheduler)
    mirror, compared = Mirror(), 0
    for turn in range(400):
        if turn < 330 and draw.random() < 0.3:
            prompt = [draw.choice((5, 6))] * draw.randint(1, 30)
            forks = [make_request(f"{turn} fork", prompt, 5, seed=1)] if draw.random() < 0.2 else []
            core.add(make_request(str(turn), prompt, draw.randint(1, 25), seed=turn), forks=forks)
        if draw.random() < 0.05 and core.scheduler.requests:
            core.finish([draw.choice(list(core.scheduler.requests))], "abort")
        if turn in (20, 200):
            core.inspect(True)
        core.step()
        if core.watch is not None and (frame := core.watch.take(idle=draw.random() < 0.5)) is not None:
            mirror.take(frame)
        if core.watch is not None and turn % 7 == 0:
            if (frame := core.watch.take(idle=True)) is not None:
                mirror.take(frame)
            assert (mirror.blocks, mirror.tables) == truth(core.scheduler)
            compared += len(mirror.tables)
    while core.has_work:
        core.step()
    assert core.watch is not None
    mirror.take(core.watch.take(idle=True) or b"{}")
    assert (mirror.blocks, mirror.tables) == truth(core.scheduler) and not mirror.tables
    assert compared > 50 and core.scheduler.num_preemptions > 3
    steps = [record["step"] for record in mirror.records if "step" in record]
    assert steps == sorted(set(steps)) and len(steps) > 200


def test_a_record_tells_the_batch_of_its_step():
    executor = FakeExecutor(num_blocks=64)
    core = EngineCore(engine_config(max_num_batched_tokens=16), executor)
    core.inspect(True)
    mirror = Mirror()
    for number, length in enumerate((6, 30, 3)):
        core.add(make_request(str(number), [number + 3] * length, 4))
    while core.has_work:
        core.step()
        frame = core.watch.take(idle=True) if core.watch is not None else None
        known = len(mirror.records)
        mirror.take(frame or b"{}")
        for record in mirror.records[known:]:
            if "step" not in record:
                continue
            plan = executor.plans[record["step"]]
            decodes = record.get("decodes", mirror.decodes)
            chunks = [tuple(chunk) for chunk in record.get("chunks", ())]
            assert len(decodes) + sum(count for _, _, count in chunks) == plan.num_tokens
            expected = [
                (str(request.key[1]), start, count)
                for request, start, count in zip(plan.requests, plan.num_computed, plan.num_new, strict=True)
                if start < request.num_prompt_tokens
            ]
            assert chunks == expected and record["sampled"] == len(plan.sampled)
    assert any(record.get("chunks") and record.get("decodes") for record in mirror.records)


def test_a_frame_holds_no_token_and_no_name_of_a_user():
    core = EngineCore(engine_config(), FakeExecutor(vocab_size=5))
    core.inspect(True)
    core.add(make_request("confidential", [77777, 88888, 99999], 4, cache_salt="tenant"))
    frames = b""
    while core.has_work:
        core.step()
        frames += (core.watch.take(idle=True) if core.watch is not None else None) or b""
    assert b'"prompt":3' in frames
    for secret in (b"confidential", b"tenant", b"77777", b"88888"):
        assert secret not in frames


def test_nothing_is_recorded_when_nobody_watches():
    core = EngineCore(engine_config(), FakeExecutor())
    pool = core.scheduler.kv.pool
    assert core.watch is None and pool.changed is None
    core.inspect(True)
    assert core.watch is not None and pool.changed is not None
    core.inspect(False)
    assert core.watch is None and pool.changed is None


def test_the_head_of_the_queue_is_in_order_and_without_what_has_ended():
    core = EngineCore(engine_config(policy="priority", max_num_seqs=1), FakeExecutor())
    draw = random.Random(0)
    for number in range(100):
        core.add(make_request(str(number), [3], 2), priority=draw.randint(0, 5))
    core.finish([str(number) for number in range(0, 100, 3)], "abort")
    waiting = core.scheduler.waiting
    expected = sorted((entry for entry in waiting if not entry[1].finished), key=lambda entry: entry[0])
    assert _head(waiting, 16) == [request for _, request in expected[:16]]
    assert _head([], 16) == []


# -- viewers -----------------------------------------------------------------------------------------------------------


def test_who_leaves_too_much_unread_gets_the_whole_state_again():
    switched: list[bool] = []

    async def watch() -> None:
        viewers = Viewers(switched.append)
        frames = viewers.frames()
        first = asyncio.ensure_future(frames.__anext__())
        await asyncio.sleep(0)
        viewers.show(b"0")
        assert await first == b"0" and switched == [True]
        for number in range(MOST_UNREAD + 5):
            viewers.show(str(number).encode())
        following = asyncio.ensure_future(frames.__anext__())
        await asyncio.sleep(0)
        assert switched == [True, True]
        viewers.show(b"all")
        assert await following == b"all"
        await frames.aclose()
        assert switched == [True, True, False] and len(viewers) == 0

    asyncio.run(watch())


def test_the_engine_process_is_watched_only_while_somebody_does():
    async def watch() -> None:
        with engine() as llm:
            await llm.ready()
            await asyncio.gather(*(collect(llm, f"before {i}") for i in range(3)))
            mirror, frames = Mirror(), llm.viewers.frames()
            mirror.take(await frames.__anext__())
            assert len(mirror.blocks) == llm.num_blocks
            tasks = await streams_in_flight(llm)
            while not mirror.tables:
                mirror.take(await frames.__anext__())
            assert len(mirror.tables) <= 4
            await asyncio.gather(*tasks)
            while mirror.tables:
                mirror.take(await frames.__anext__())
            assert all(refs == 0 for refs, _ in mirror.blocks)
            await frames.aclose()
            shown: list[bytes] = []
            llm.viewers.show = shown.append  # type: ignore[method-assign]
            await collect(llm, "after", params=LONG)
            await quiet(llm)
            assert len(shown) <= 1  # one may have been under way

    asyncio.run(watch())
