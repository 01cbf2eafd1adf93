"""The inspector: what it shows is what the scheduler and its block pool hold, in frames and on the page itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import httpx
import pytest
from browser import Page, browser
from engine_processes import LONG, child_pid, collect, engine, quiet, streams_in_flight
from fake_executor import FakeExecutor, FakeHandle, engine_config, make_request
from serving import served

from nanovllm import AsyncLLM, SamplingParams
from nanovllm.engine.caller import Caller
from nanovllm.engine.core import EngineCore
from nanovllm.engine.inspection import LOST, MOST_UNREAD, Viewers
from nanovllm.engine.invariants import InvariantChecker
from nanovllm.engine.messages import Inspect, View
from nanovllm.engine.plan import StepPlan
from nanovllm.engine.request import Request
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.thread_core import ThreadCore
from nanovllm.engine.wire import decode_command, decode_message, encode_command, encode_message
from nanovllm.entrypoints.serve.app import build_app
from nanovllm.entrypoints.serve.args import ServeArgs
from nanovllm.entrypoints.serve.inspector import FILES, FOLDER, PAGE

Json = dict[str, Any]


class Mirror:
    """What a page knows after the frames it has got."""

    def __init__(self) -> None:
        self.blocks: list[tuple[int, int]] = []  # references, cached
        self.tables: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}
        self.decodes: list[str] = []
        self.records: list[Json] = []

    def take(self, frame: bytes) -> None:
        said = json.loads(frame)
        if "full" in said:
            full = said["full"]
            self.blocks = [(refs, cached) for count, refs, cached in full["blocks"] for _ in range(count)]
            self.tables = {each["name"]: each["table"] for each in full["requests"]}
            self.computed = {each["name"]: each["computed"] for each in full["requests"]}
        for record in said.get("records", ()):
            self.records.append(record)
            for name, _ in record.get("gone", ()):
                del self.tables[name], self.computed[name]
            for start in record.get("starts", ()):
                self.tables[start["name"]] = []
                self.computed[start["name"]] = start["computed"]
            for name, first, blocks in record.get("tables", ()):
                assert first == len(self.tables[name])
                self.tables[name] += blocks
            self.decodes = record.get("decodes", self.decodes) if "step" in record else []
            for name in self.decodes:
                self.computed[name] += 1
            for name, start, count in record.get("chunks", ()):
                assert self.computed[name] == start
                self.computed[name] += count
            for block, refs, cached in record.get("blocks", ()):
                self.blocks[block] = (refs, cached)


def name_of(request: Request) -> str:
    _, arrival, index = request.key
    return f"{arrival}.{index}" if index else f"{arrival}"


def truth(scheduler: Scheduler) -> tuple[list[tuple[int, int]], dict[str, list[int]]]:
    """What the scheduler holds: its blocks, and the tables of its requests by their names."""
    pool = scheduler.kv.pool
    blocks = [(refs, int(each is not None)) for refs, each in zip(pool.ref_count, pool.hash_of, strict=True)]
    holders = [*scheduler.running, *scheduler.leaving.values(), *scheduler.held.values()]
    return blocks, {name_of(each): list(each.blocks) for each in holders if each.blocks}


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
            assert all(mirror.computed[name_of(each)] == each.num_computed for each in core.scheduler.running)
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
    assert waiting.first(16) == sorted(waiting, key=lambda request: request.key)[:16]
    core.finish([str(number) for number in range(100)], "abort")
    assert waiting.first(16) == []


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


def test_a_viewer_is_let_go_even_while_he_reads_a_frame():
    async def watch() -> None:
        viewers = Viewers(lambda on: None)
        frames = viewers.frames()
        first = asyncio.ensure_future(frames.__anext__())
        await asyncio.sleep(0)
        viewers.show(b"0")
        assert await first == b"0"
        viewers.close()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(frames.__anext__(), 10)

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


def test_views_and_orders_for_them_travel():
    frame = bytes(range(256))
    assert decode_message(encode_message(View(frame))) == View(frame)
    for on in (True, False):
        assert decode_command(encode_command(Inspect(on))) == Inspect(on)


def test_a_viewer_is_told_of_the_death_of_the_engine_and_shown_the_next():
    async def watch() -> None:
        with engine(max_restarts=1) as llm:
            await llm.ready()
            frames = llm.viewers.frames()
            assert "full" in json.loads(await frames.__anext__())
            os.kill(child_pid(llm), signal.SIGKILL)
            assert await frames.__anext__() == LOST
            assert "full" in json.loads(await asyncio.wait_for(frames.__anext__(), 30))
            await frames.aclose()

    asyncio.run(watch())


# -- the page ----------------------------------------------------------------------------------------------------------


class Witness(FakeExecutor):
    """Remembers what the scheduler held when each step began."""

    scheduler: Scheduler

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: dict[int, Json] = {}

    def submit(self, plan: StepPlan) -> FakeHandle:
        scheduler = self.scheduler
        blocks, tables = truth(scheduler)
        computed = {name: 0 for name in tables}
        for request in scheduler.running:
            computed[name_of(request)] = request.num_computed
        self.seen[plan.step] = {
            "blocks": [list(each) for each in blocks],
            "tables": tables,
            "running": len(scheduler.running),
            "waiting": scheduler.num_waiting,
            "tenants": {name: list(counts) for name, counts in scheduler.waiting.tenants().items()},
            "tokens": plan.num_tokens,
            "free": scheduler.kv.pool.num_free,
            "computed": computed,
        }
        return super().submit(plan)


class Of(Caller):
    """A tenant."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant


class Site:
    """A server in this process, over an executor that computes nothing, so that its scheduler can be looked into."""

    def __init__(self, url: str, llm: AsyncLLM, loop: asyncio.AbstractEventLoop, witness: Witness) -> None:
        self.url, self.llm, self.witness, self._loop = url, llm, witness, loop

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def load(self, count: int, seed: int) -> None:
        """Requests that share beginnings, fork, and are more than the cache and the batch can take at once."""
        draw = random.Random(seed)

        async def ask(number: int) -> None:
            await asyncio.sleep(draw.random() * 0.3)
            prompt = [7] * 12 + [draw.randint(3, 90) for _ in range(draw.randint(1, 30))]
            params = SamplingParams(max_tokens=draw.randint(10, 50), ignore_eos=True, n=1 + (number % 5 == 0))
            caller = Of(("", "blue", "red")[number % 3])
            async for _ in self.llm.generate(prompt, params, f"{seed} {number}", caller=caller):
                pass

        await asyncio.gather(*(ask(number) for number in range(count)))


@contextlib.contextmanager
def site(**settings: Any) -> Iterator[Site]:
    import uvicorn

    witness = Witness(num_blocks=60, seconds=0.005)
    llm = AsyncLLM(engine_config(max_num_batched_tokens=32), witness)
    assert isinstance(llm._core, ThreadCore)
    witness.scheduler = llm._core.core.scheduler
    app = build_app(llm, ServeArgs(served_model_name=["fake"], **settings))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1))
    loops: list[asyncio.AbstractEventLoop] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        async def main() -> None:
            loops.append(asyncio.get_running_loop())
            await llm.ready()
            await server.serve([listener])

        thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Site(f"http://127.0.0.1:{listener.getsockname()[1]}", llm, loops[0], witness)
        finally:
            loops[0].call_soon_threadsafe(llm.viewers.close)
            server.should_exit = True
            thread.join(20)
            llm.shutdown()


@contextlib.contextmanager
def watching(where: Site) -> Iterator[Page]:
    with browser() as page:
        page.open(f"{where.url}/inspector")
        page.wait("inspector.link === 'live'")
        yield page


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_the_page_shows_what_the_scheduler_held_at_every_step():
    with site() as where, watching(where) as page:
        where.run(where.load(20, seed=1))
        last = max(where.witness.seen)
        page.wait(f"inspector.state().step === {last} && inspector.state().totals.owned === 0")
        places = page.evaluate("inspector.place")
        compared = shared = 0
        first, count = places["from"] + 1, places["to"] - places["from"] - 1  # the last shows what its end has freed
        states = page.evaluate(f"Array.from({{ length: {count} }}, (_, index) => inspector.state({first} + index))")
        for shown in states:
            seen = where.witness.seen[shown["step"]]
            assert shown["blocks"] == seen["blocks"], shown["step"]
            assert shown["tables"] == seen["tables"] and shown["computed"] == seen["computed"]
            assert (shown["running"], shown["waiting"]) == (seen["running"], seen["waiting"])
            assert shown["tenants"] == seen["tenants"]
            assert len(shown["decodes"]) + sum(chunk[2] for chunk in shown["chunks"]) == seen["tokens"]
            compared += 1
            shared += shown["totals"]["shared"] > 0
        assert compared > 60 and shared > 10 and where.witness.scheduler.num_preemptions > 0
        middle = next(step for step, seen in where.witness.seen.items() if seen["waiting"] and step > last // 3)
        seen = where.witness.seen[middle]
        back = first + next(index for index, shown in enumerate(states) if shown["step"] == middle)
        page.evaluate(f"inspector.go({back})")
        page.wait(f"document.querySelector('#step').textContent === '{middle}'")
        assert number(page.text("#owned")) == 59 - seen["free"]
        assert number(page.text("#shared")) == sum(refs > 1 for refs, _ in seen["blocks"])
        assert number(page.text("#cached")) == sum(not refs and cached for refs, cached in seen["blocks"])
        free = sum(not refs and not cached for refs, cached in seen["blocks"][1:])
        assert number(page.text("#free")) == free
        assert (number(page.text("#running")), number(page.text("#waiting"))) == (seen["running"], seen["waiting"])
        assert page.evaluate("document.querySelectorAll('#requests li').length") == len(seen["tables"])
        rows = page.evaluate("[...document.querySelectorAll('#tenants li')].map((row) => row.innerText)")
        told = [re.findall(r"\w+", row) for row in rows]
        counts = sorted(seen["tenants"].items())
        assert told == [[name, str(runs), "running", str(waits), "waiting"] for name, (runs, waits) in counts] != []
        used = 59 - seen["free"]
        assert page.text("#usage") == f"{100 * used / 59:.{1 if 0 < used < 59 else 0}f} %"
        _blocks_are_painted(page, seen)
        assert page.errors == [] and all(url.startswith(where.url) for url in page.urls)


def _blocks_are_painted(page: Page, seen: Json) -> None:
    """Blocks that are nobody's have one colour, those of requests have others."""
    script = """(block) => {
        const { x, y, size } = inspector.cell(block), scale = devicePixelRatio;
        const canvas = document.querySelector('#blocks').getContext('2d');
        return [...canvas.getImageData((x + 2) * scale, (y + 3) * scale, 1, 1).data].join();
    }"""
    colours = [page.evaluate(f"({script})({block})") for block in range(len(seen["blocks"]))]
    unused = {colours[block] for block, state in enumerate(seen["blocks"]) if block and state == [0, 0]}
    cached = {colours[block] for block, state in enumerate(seen["blocks"]) if state == [0, 1]}
    owned = {colours[block] for block, state in enumerate(seen["blocks"]) if state[0]}
    assert len(unused) <= 1 and len(cached) <= 1 and len(owned) > 3
    assert not unused & owned and not cached & owned and not unused & cached


def test_one_can_stop_step_replay_and_follow_again():
    with site() as where, watching(where) as page:
        where.run(where.load(6, seed=2))
        page.wait("inspector.place.to > 30 && inspector.state().totals.owned === 0")
        page.press("Home")
        assert page.wait("inspector.place.live === false") and page.evaluate("inspector.place.at") == 0
        for _ in range(3):
            page.press("ArrowRight")
        page.press("ArrowLeft")
        assert page.evaluate("inspector.place.at") == 2
        shown = page.evaluate("inspector.state()")
        where.run(where.load(3, seed=3))
        page.wait("inspector.place.to > 40")
        assert page.evaluate("inspector.state()") == shown and page.text("#live") == "Live"
        page.click("#play")
        page.wait("inspector.place.at > 4")
        page.click("#play")
        page.press("End")
        assert page.evaluate("inspector.place.live") is True
        assert page.errors == []


def test_the_page_speaks_two_languages_and_has_two_themes():
    with site() as where, watching(where) as page:
        page.wait("document.querySelector('#blocks').width > 300")
        english = page.text("#blocks-panel h2")
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.click("#language")
        assert page.text("#blocks-panel h2") != english and "缓存" in page.text("#blocks-panel h2")
        assert page.evaluate("document.documentElement.lang") == "zh"
        page.click("#theme")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
        words = "import(location.origin + '/inspector/words.js').then((m) => %s)"
        assert page.evaluate(words % "Object.keys(m.languages.en).join() === Object.keys(m.languages.zh).join()")
        used = "[...document.querySelectorAll('[data-word]')].map((e) => e.dataset.word)"
        assert page.evaluate(words % f"{used}.filter((name) => typeof m.languages.en[name] !== 'string')") == []
        assert page.errors == []


def test_the_page_asks_for_the_key():
    with site(api_key=["secret"]) as where, browser() as page:
        page.open(f"{where.url}/inspector")
        page.wait("inspector.link === 'key' && !document.querySelector('#key').hidden")
        page.evaluate("document.querySelector('#key-value').value = 'secret'")
        page.click("#key button")
        page.wait("inspector.link === 'live' && inspector.state().blocks.length === 60")
        assert page.evaluate("document.querySelector('#key').hidden") is True


# -- the server --------------------------------------------------------------------------------------------------------


def test_the_page_is_open_and_loads_nothing_from_elsewhere():
    with site(api_key=["secret"]) as where:
        answer = httpx.get(f"{where.url}/inspector")
        assert answer.status_code == 200 and "default-src 'self'" in answer.headers["content-security-policy"]
        for name in FILES:
            assert httpx.get(f"{where.url}/inspector/{name}").status_code == 200
        for path in ("inspector/events", "inspector/../config.py", "inspector/%2e%2e/%2e%2e/config.py"):
            assert httpx.get(f"{where.url}/{path}").status_code in (401, 404)
        headers = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{where.url}/inspector/none.js", headers=headers).status_code == 404
    assert {file.name for file in FOLDER.iterdir()} == {PAGE, *FILES}
    for file in FOLDER.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text, file.name


def test_it_can_be_left_out():
    with site(disable_inspector=True) as where:
        for path in ("inspector", "inspector/events", "inspector/main.js"):
            assert httpx.get(f"{where.url}/{path}").status_code == 404


def test_a_viewer_who_leaves_is_not_shown_anything_more():
    with site() as where:
        with httpx.stream("GET", f"{where.url}/inspector/events") as answer:
            lines = answer.iter_lines()  # the stream is closed when nobody holds it
            first = next(lines)
            assert first.startswith('data: {"records":[') and answer.headers["content-type"].startswith("text/event-")
            assert len(where.llm.viewers) == 1
        deadline = time.monotonic() + 20
        while len(where.llm.viewers) or where.witness.scheduler.kv.pool.changed is not None:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_only_so_many_viewers_are_let_in(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nanovllm.entrypoints.serve.inspector.MOST_VIEWERS", 1)
    with site() as where, httpx.stream("GET", f"{where.url}/inspector/events") as answer:
        lines = answer.iter_lines()  # the stream is closed when nobody holds it
        assert next(lines)
        refused = httpx.get(f"{where.url}/inspector/events")
        assert refused.status_code == 503 and "viewers" in refused.json()["error"]["message"]


def test_a_viewer_does_not_keep_the_server_from_ending():
    """And the page of a real server counts as its metrics do."""
    with served("--num-gpu-blocks-override", "200") as server:
        mirror, asked, hit = Mirror(), 0, 0
        with httpx.stream("GET", f"{server.url}/inspector/events", timeout=60) as answer:
            lines = answer.iter_lines()
            for turn in range(2):
                server.ask("/v1/completions", {"prompt": "The same words, again and again. " * 8, "max_tokens": 40})
                while turn == 0 and not any("starts" in each for each in mirror.records):
                    line = next(lines)
                    mirror.take(line.removeprefix("data: ").encode() if line.startswith("data") else b"{}")
            server.wait_until_idle()
            metrics = server.client.get("/metrics").text
            assert server.stop(signal.SIGTERM, 10.0) == 0
            for line in lines:
                mirror.take(line.removeprefix("data: ").encode() if line.startswith("data") else b"{}")
    for record in mirror.records:
        asked += sum(start["prompt"] for start in record.get("starts", ()))
        hit += sum(start["cached"] for start in record.get("starts", ()))
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith("vllm:prefix_cache_"))
    totals = {name.partition("{")[0]: float(value) for name, value in values.items()}
    assert totals["vllm:prefix_cache_queries_total"] == asked > 0
    assert totals["vllm:prefix_cache_hits_total"] == hit > 0
    assert mirror.tables == {} and len(mirror.blocks) == 200
