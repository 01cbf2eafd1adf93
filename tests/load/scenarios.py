"""What is done to a server, what must hold whatever is done, and the figures that come of it.

Every scenario leaves the server at rest. Answers of the engine without a model are known, so each token is compared:
none may be lost, repeated or anybody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import statistics
import time
from collections import Counter
from typing import Any

from .client import Answer, get, post, send
from .engine import expected_tokens
from .server import Footprint, LoadServer

COMPLETIONS = "/v1/completions"
Figures = dict[str, Any]


class Requests:
    """Makes completions, each of its own, and judges their answers.

    Args:
        server: that is asked.
        known: whether the engine is the one whose answers are known.
    """

    def __init__(self, server: LoadServer, known: bool = True, seed: int = 0) -> None:
        self.server = server
        self.chance = random.Random(seed)
        self._known = known
        self._number = 0

    async def stream(self, max_tokens: int, prompt_length: int = 8, **how: Any) -> Answer:
        """Ask for a stream; its answer is right, or an honest refusal."""
        self._number += 1
        seed = self._number
        body = {
            "prompt": [self.chance.randint(10, 90) for _ in range(prompt_length)],
            "max_tokens": max_tokens,
            "seed": seed,
            "stream": True,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = await send(self.server.port, post(COMPLETIONS, body), **how)
        if answer.status == 200 and how.get("leave_after") is None:
            self._judge(answer, seed, prompt_length, max_tokens)
        elif answer.status not in (0, 200, 503):
            raise AssertionError(f"status {answer.status}: {answer.body[:300]!r}")
        return answer

    def _judge(self, answer: Answer, seed: int, prompt_length: int, max_tokens: int) -> None:
        assert answer.ended and answer.done, f"an accepted request was lost: {answer.body[-300:]!r}"
        if answer.error is not None:
            return
        tokens = answer.tokens
        assert len(tokens) == max_tokens, f"{len(tokens)} tokens instead of {max_tokens}"
        if self._known:
            assert tokens == expected_tokens(seed, prompt_length, max_tokens), "tokens of somebody else, or again"


async def hold(server: LoadServer, count: int, max_tokens: int, known: bool = True, scrapes: int = 20) -> Figures:
    """``count`` streams at once, all of them live; meanwhile the metrics are read."""
    requests = Requests(server, known)
    await requests.stream(4)
    await server.idle()
    before = server.footprints()
    began = time.monotonic()
    tasks = [asyncio.create_task(requests.stream(max_tokens, timed=True)) for _ in range(count)]
    state = await server.health()
    while state["num_running"] + state["num_waiting"] < count:
        assert not any(task.done() for task in tasks), "a stream has ended before the last began; ask for more tokens"
        assert time.monotonic() - began < 120, f"only {state} of {count}"
        await asyncio.sleep(0.05)
        state = await server.health()
    opened = time.monotonic() - began
    during = server.footprints()
    seconds, live = [], count
    for _ in range(scrapes):
        start = time.monotonic()
        answer = await send(server.port, get("/metrics"))
        seconds.append(time.monotonic() - start)
        assert answer.ended and answer.status == 200
        live = min(live, sum(not task.done() for task in tasks))
        await asyncio.sleep(0.1)
    answers = await asyncio.gather(*tasks)
    took = time.monotonic() - began
    assert all(answer.status == 200 and answer.error is None for answer in answers)
    gaps = [b - a for answer in answers for a, b in zip(answer.times[1:], answer.times[2:], strict=False)]
    await server.idle()
    return {
        "streams": count,
        "all_live_after_s": opened,
        "live_at_the_last_scrape": live,
        "tokens_per_s": count * max_tokens / took,
        "first_token_s": percentiles([answer.first - answer.start for answer in answers]),
        "between_reads_s": percentiles(gaps),
        "front_bytes_per_connection": (during["front"].rss - before["front"].rss) / count,
        "front_files_per_connection": (during["front"].files - before["front"].files) / count,
        "metrics_scrape_s": percentiles(seconds),
    }


async def overload(server: LoadServer, seconds: float, factor: float, max_tokens: int, clients: int) -> Figures:
    """Goodput of as many clients as the server takes, and with ``factor`` times as many requests as it can answer."""
    requests = Requests(server)
    peak = await _closed_loop(requests, seconds, max_tokens, clients)
    await server.idle()
    rate = factor * peak
    statuses: Counter[int] = Counter()
    tasks: list[asyncio.Task[Answer]] = []
    began = due = time.monotonic()
    while (now := time.monotonic()) < began + seconds:
        while due <= now:
            tasks.append(asyncio.create_task(requests.stream(max_tokens)))
            due += requests.chance.expovariate(rate)
        await asyncio.sleep(0.002)
    answers = await asyncio.gather(*tasks)
    statuses.update(answer.status for answer in answers)
    good = [answer for answer in answers if answer.status == 200]
    assert all(answer.error is None for answer in good)
    in_time = sum(answer.last < began + seconds for answer in good)
    await server.idle()
    return {
        "peak_requests_per_s": peak,
        "offered_requests_per_s": len(tasks) / seconds,
        "goodput_requests_per_s": in_time / seconds,
        "goodput_of_peak": in_time / seconds / peak,
        "answers": dict(statuses),
        "lost": sum(not answer.done for answer in good),
        "refused_after_s": percentiles([answer.last - answer.start for answer in answers if answer.status == 503]),
        "accepted_s": percentiles([answer.last - answer.start for answer in good]),
    }


async def _closed_loop(requests: Requests, seconds: float, max_tokens: int, clients: int) -> float:
    """Answers per second while each of ``clients`` asks again as soon as it has its answer."""
    began, ends = time.monotonic(), []

    async def ask() -> None:
        while time.monotonic() < began + seconds:
            answer = await requests.stream(max_tokens)
            if answer.status == 200:
                ends.append(answer.last)
            else:
                await asyncio.sleep(0.05)

    await asyncio.gather(*(ask() for _ in range(clients)))
    return sum(end < began + seconds for end in ends) / seconds


async def soak(server: LoadServer, seconds: float, clients: int, warm_up: float, known: bool = True) -> Figures:
    """Clients of every kind, for a while; then everything is as it was."""
    requests = Requests(server, known)
    counts: Counter[str] = Counter()

    async def run(until: float) -> None:
        async def client() -> None:
            while time.monotonic() < until:
                await _anything(requests, counts)

        await asyncio.gather(*(client() for _ in range(clients)))
        await server.idle()

    await run(time.monotonic() + warm_up)
    before = await _at_rest(server)
    counts.clear()
    await run(time.monotonic() + seconds)
    after = await _at_rest(server)
    figures: Figures = {"seconds": seconds, "clients": clients, "requests": dict(counts)}
    for name, now in after.items():
        then = before[name]
        figures[name] = {
            "rss_bytes": [then.rss, now.rss],
            "rss_growth": now.rss / then.rss - 1,
            "files": [then.files, now.files],
            "threads": [then.threads, now.threads],
        }
        assert now.files <= then.files, f"{name}: {now.files} files are open, and were {then.files}"
        assert now.threads <= then.threads, f"{name}: {now.threads} threads, and there were {then.threads}"
    figures["faults"] = (await server.health())["faults"]
    return figures


async def _at_rest(server: LoadServer) -> dict[str, Footprint]:
    await server.idle()
    await asyncio.sleep(2.5)  # the server looks after its memory once a second
    return server.footprints()


async def _anything(requests: Requests, counts: Counter[str]) -> None:
    """One request of a kind that chance decides."""
    chance, port = requests.chance, requests.server.port
    kind = chance.choices(
        ["stream", "long", "leaves", "leaves at once", "slow", "whole", "malformed", "chat"],
        [40, 5, 12, 6, 4, 8, 20, 5],
    )[0]
    counts[kind] += 1
    if kind in ("stream", "long"):
        length = chance.choice([1, 3, 8, 50]) if kind == "stream" else 600
        await requests.stream(chance.randint(1, 40), length)
    elif kind == "leaves":
        await requests.stream(200, leave_after=chance.randint(200, 4000))
    elif kind == "leaves at once":
        await requests.stream(200, leave_after=0)
    elif kind == "slow":
        await requests.stream(30, pause=0.02)
    elif kind == "whole":
        body = {"prompt": "hello", "max_tokens": 10, "n": chance.randint(1, 3), "ignore_eos": True}
        answer = await send(port, post(COMPLETIONS, body))
        assert answer.status in (200, 503) and answer.ended, (answer.status, answer.body[:300])
    elif kind == "chat":
        body = {
            "messages": [{"role": "user", "content": "hi " * chance.randint(1, 40)}],
            "max_tokens": 9,
            "stream": True,
        }
        answer = await send(port, post("/v1/chat/completions", body))
        assert answer.status == 503 or (answer.status == 200 and answer.done), (answer.status, answer.body[-300:])
    else:
        name, request, statuses = malformed(chance)
        answer = await send(port, request, leave_after=0 if statuses == (0,) else None)
        assert answer.status in (*statuses, 503), f"{name}: {answer.status} {answer.body[:300]!r}"
        counts[f"malformed: {name}"] += 1


def malformed(chance: random.Random) -> tuple[str, bytes, tuple[int, ...]]:
    """A request that cannot be honoured: its name, its bytes, and the statuses it may be answered with.

    0: the client does not wait for an answer.
    """
    size = 33 << 20  # more than a body may have
    cases = {
        "no JSON": (post(COMPLETIONS, b"{broken"), (400,)),
        "no text": (post(COMPLETIONS, b"\xff\xfe\x00\x01" * 100), (400,)),
        "no object": (post(COMPLETIONS, b"[1, 2, 3]"), (400,)),
        "deep": (post(COMPLETIONS, b'{"prompt":' + b"[" * 100_000), (400,)),
        "deep and closed": (post(COMPLETIONS, b'{"prompt":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), (400,)),
        "long number": (post(COMPLETIONS, b'{"prompt":"x","seed":' + b"9" * 10_000 + b"}"), (400,)),
        "not a number": (post(COMPLETIONS, b'{"prompt":"x","temperature":NaN}'), (400,)),
        "wrong types": (post(COMPLETIONS, {"prompt": {"a": 1}, "max_tokens": "many"}), (400,)),
        "no such token": (post(COMPLETIONS, {"prompt": [10**9]}), (400,)),
        "too long": (post(COMPLETIONS, {"prompt": "word " * 20_000}), (400,)),
        "half a character": (post(COMPLETIONS, b'{"prompt":"\\ud800","max_tokens":1}'), (200, 400)),
        "announced as huge": (post(COMPLETIONS, b"{}", f"Content-Length: {size}"), (0, 413)),
        "no number of bytes": (post(COMPLETIONS, b"{}", "Content-Length: many"), (400,)),
        "two lengths": (post(COMPLETIONS, b"{}", "Content-Length: 2", "Content-Length: 3"), (400,)),
        "no HTTP": (os.urandom(200).replace(b"\n", b" ") + b"\r\n\r\n", (400,)),
        "long head": (b"GET / HTTP/1.1\r\nX: " + b"x" * 300_000 + b"\r\n\r\n", (400, 0)),
        "half a head": (b"POST /v1/comp", (0,)),
        "half a body": (post(COMPLETIONS, b'{"prompt":', "Content-Length: 1000"), (0,)),
        "no path": (post("/v1/nothing", {"x": 1}), (404,)),
        "no method": (post("/metrics", {"x": 1}), (405,)),
    }
    name = chance.choice([*cases, "huge, in chunks"])
    if name == "huge, in chunks":
        piece = b"x" * (1 << 20)
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for _ in range(34)) + b"0\r\n\r\n"
        return name, post(COMPLETIONS, b"", "Transfer-Encoding: chunked") + chunks, (413, 0)
    request, statuses = cases[name]
    return name, request, statuses


async def flood(server: LoadServer, count: int, max_tokens: int = 4) -> Figures:
    """``count`` requests at once: each is answered or refused, and none has to wait for ever."""
    requests = Requests(server)
    await asyncio.gather(*(requests.stream(max_tokens) for _ in range(32)))  # threads are made when first needed
    before = await _at_rest(server)
    began = time.monotonic()
    answers = await asyncio.gather(*(requests.stream(max_tokens) for _ in range(count)))
    took = time.monotonic() - began
    statuses = Counter(answer.status for answer in answers)
    assert statuses[200] > 0 and all(answer.error is None for answer in answers if answer.status == 200)
    await server.idle()
    after = await _at_rest(server)
    for name, now in after.items():
        assert now.files <= before[name].files and now.threads <= before[name].threads, (name, before[name], now)
    return {
        "requests": count,
        "seconds": took,
        "answers": dict(statuses),
        "reset": sum(answer.reset for answer in answers),
        "accepted_s": percentiles([answer.last - answer.start for answer in answers if answer.status == 200]),
        "refused_after_s": percentiles([answer.last - answer.start for answer in answers if answer.status == 503]),
        "rss_bytes": {name: [before[name].rss, now.rss] for name, now in after.items()},
    }


async def kill(server: LoadServer, count: int, max_tokens: int = 200) -> Figures:
    """The engine's process is killed while it answers: each stream is told, and soon there is another engine."""
    requests = Requests(server)
    tasks = [asyncio.create_task(requests.stream(max_tokens)) for _ in range(count)]
    while (await server.health())["num_running"] < min(count, 8):
        await asyncio.sleep(0.01)
    os.kill(server.engine_pid, signal.SIGKILL)
    began = time.monotonic()
    answers = await asyncio.gather(*tasks)
    told = max(answer.last for answer in answers) - began
    for answer in answers:
        refused = answer.status in (500, 503)
        assert refused or (answer.done and (answer.error or len(answer.tokens) == max_tokens)), answer.body[-300:]
    while (await server.health()).get("status") != "ok":
        assert time.monotonic() - began < 60, "no engine comes back"
        await asyncio.sleep(0.05)
    back = time.monotonic() - began
    assert (await requests.stream(5)).status == 200
    await server.idle()
    faults = (await server.health())["faults"]
    assert faults.get("engine_died"), faults
    return {"streams": count, "last_told_s": told, "engine_back_s": back, "faults": faults}


def percentiles(values: list[float]) -> dict[str, float]:
    """Median, the 99th percentile and the largest; empty for no values."""
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "p50": statistics.median(ordered),
        "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "max": ordered[-1],
    }


def run(scenario: Any) -> Figures:
    """Run a scenario on an event loop of its own."""
    with contextlib.suppress(ImportError):
        import uvloop

        found: Figures = uvloop.run(scenario)
        return found
    result: Figures = asyncio.run(scenario)
    return result
