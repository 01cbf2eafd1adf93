"""What the HTTP server adds to the engine: throughput, delay of a token, time to start, CPU time while idle.

    python benchmarks/serve_overhead.py

- ``throughput``: the same requests to ``LLM.generate`` and, as streams, to ``nanovllm serve``, in turn
- ``delay``: from the end of the engine's step to the socket, and to the client, of every token of parallel streams
- ``start``: from starting the command to the first answer, and CPU time of the idle server

Everything runs on one machine: server, engine and client share its cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from report import RESULTS, print_table, write_results

from nanovllm.entrypoints.bench.backends import RequestResult
from nanovllm.entrypoints.bench.datasets import SampleRequest, random_requests, text_token_ids
from nanovllm.entrypoints.bench.serve import Target, measure_serving
from nanovllm.entrypoints.serve.listener import run_loop

ROOT = Path(__file__).parents[1]
START_LIMIT = 120.0  # seconds
IDLE_SECONDS = 5.0


class Server:
    """A server in a process of its own.

    Args:
        command: arguments of Python; `nanovllm serve` follows.
    """

    def __init__(self, model: str, *command: str) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        words = [sys.executable, *(command or ("-m", "nanovllm")), "serve", model, "--host", "127.0.0.1", "--port", "0"]
        started = time.perf_counter()
        self.process = subprocess.Popen(words, stdout=self._log, stderr=self._log, env=_environment())
        self.url = self._await_start(started + START_LIMIT)
        self.ready_after = time.perf_counter() - started

    def _await_start(self, deadline: float) -> str:
        while time.perf_counter() < deadline and self.process.poll() is None:
            self._log.seek(0)
            log = self._log.read()
            if "Application startup complete." in log:
                return next(line for line in log.splitlines() if " Serving " in line).rpartition(" on ")[2].strip()
            time.sleep(0.005)
        self.process.kill()
        raise SystemExit(f"the server does not start:\n{self._log.read()}")

    def pids(self) -> dict[str, int]:
        """The processes: the front, and the engine that is its child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = {"front": self.process.pid}
        with contextlib.suppress(OSError):
            found["engine"] = int(children.read_text().split()[0])
        return found

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        self._log.close()


class Engine:
    """`LLM.generate` in a process of its own."""

    def __init__(self, model: str) -> None:
        words = [sys.executable, __file__, "--engine", "--model", model]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment()
        )
        self.generate([[1, 2, 3]], 2)

    def generate(self, prompts: list[list[int]], output_len: int) -> float:
        """Seconds for these prompts, so many tokens each."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([prompts, output_len]) + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def run_engine(model: str) -> None:
    """The other side of `Engine`."""
    from nanovllm import LLM, SamplingParams

    with LLM(model) as llm:
        for line in sys.stdin:
            prompts, output_len = json.loads(line)
            params = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=output_len)
            llm.reset_prefix_cache()
            start = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            print(time.perf_counter() - start, flush=True)


def run_noting_server(notes: str) -> int:
    """`nanovllm serve` that notes, of every token of every stream, when its step ended and when it was written."""
    from nanovllm.engine.async_llm import AsyncLLM
    from nanovllm.engine.output import OutputProcessor
    from nanovllm.entrypoints.cli.main import main
    from nanovllm.entrypoints.serve.sse import EventStream

    made: dict[str, float] = {}  # request -> end of the step of its oldest token that was not handed out
    current: dict[Any, float] = {}  # task -> the same of the output it is writing
    written: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    take, generate, run = OutputProcessor.take, AsyncLLM.generate, EventStream._run

    def noting_take(self: Any, outputs: Any, stats: Any = None) -> Any:
        due, to_stop = take(self, outputs, stats)
        for request_id in due:
            made[request_id] = stats.timestamp
        return due, to_stop

    async def noting_generate(self: Any, prompt: Any, params: Any, request_id: str, **more: Any) -> Any:
        async for output in generate(self, prompt, params, request_id, **more):
            current[asyncio.current_task()] = made.pop(request_id)
            yield output

    async def noting_run(self: Any, scope: Any, receive: Any, send: Any) -> None:
        task = asyncio.current_task()

        async def noting_send(message: Any) -> None:
            await send(message)
            if message.get("body") and task in current:
                written[task].append((current.pop(task), time.monotonic()))

        await run(self, scope, receive, noting_send)

    OutputProcessor.take, AsyncLLM.generate, EventStream._run = noting_take, noting_generate, noting_run  # type: ignore[method-assign,assignment]
    code = main(sys.argv[sys.argv.index("serve") :])
    Path(notes).write_text(json.dumps(list(written.values())))
    return code


def throughput(options: argparse.Namespace, requests: list[SampleRequest]) -> dict[str, Any]:
    """Output tokens per second of the engine alone and of the server, in turn."""
    prompts = [request.prompt for request in requests]
    rounds: list[dict[str, Any]] = []
    engine = Engine(options.model)
    try:
        with Server(options.model) as server:
            for number in range(options.rounds + 1):
                alone = engine.generate(prompts, options.output_len)  # type: ignore[arg-type]
                before = {name: _cpu_seconds(pid) for name, pid in server.pids().items()}
                own = time.process_time()
                results, duration = stream(server.url, requests)
                cpu = {name: _cpu_seconds(pid) - before[name] for name, pid in server.pids().items()}
                tokens = sum(result.output_len or 0 for result in results)
                assert tokens == len(requests) * options.output_len
                if number:  # the first round warms up
                    cpu["client"] = time.process_time() - own
                    rounds.append({"engine": tokens / alone, "server": tokens / duration, "cpu_seconds": cpu})
    finally:
        engine.close()
    alone, served = (statistics.median(each[name] for each in rounds) for name in ("engine", "server"))
    ratio = statistics.median(each["server"] / each["engine"] for each in rounds)
    cpu = {name: statistics.median(each["cpu_seconds"][name] for each in rounds) for name in rounds[0]["cpu_seconds"]}
    tokens = len(requests) * options.output_len
    print_table(
        ["output tok/s, medians", "engine alone", "server", "server / engine"],
        [[f"{len(requests)} streams", alone, served, ratio]],
    )
    print_table(
        ["CPU time per token, us", *cpu],
        [["during the server's rounds", *(each / tokens * 1e6 for each in cpu.values())]],
    )
    return {"engine": alone, "server": served, "ratio": ratio, "cpu_seconds": cpu, "rounds": rounds}


def delay(options: argparse.Namespace, requests: list[SampleRequest]) -> dict[str, Any]:
    """Milliseconds from the end of a token's step to the socket, and to the client."""
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes.json"
        with Server(options.model, __file__, "--noting-server", str(notes)) as server:
            stream(server.url, requests)
            results, _ = stream(server.url, requests)
        streams = json.loads(notes.read_text())[-len(requests) :]
    to_socket = [(written - made) * 1e3 for each in streams for made, written in each]
    # The client's clock is the server's (CLOCK_MONOTONIC). Streams are matched by their first token's way.
    arrivals = [[result.start_time + result.ttft + t for t in np.cumsum([0.0, *result.itls])] for result in results]
    matched = zip(sorted(arrivals), sorted(streams, key=lambda each: each[0][1]), strict=True)
    to_client = [(at - made) * 1e3 for times, each in matched for at, (made, _) in zip(times, each, strict=False)]
    table, found = [], {}
    for name, values in (("to the socket", to_socket), ("to the client", to_client)):
        found[name] = {
            "mean": float(np.mean(values)),
            **{f"p{p}": float(np.percentile(values, p)) for p in (50, 90, 99)},
        }
        table.append([name, *found[name].values()])
    print_table([f"delay of a token, ms; {len(requests)} streams", "mean", "p50", "p90", "p99"], table)
    return found


def start(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to the line that says the server is ready and to the first answer; share of a core used while idle."""
    ready, first, idle = [], [], []
    for _ in range(options.rounds):
        began = time.perf_counter()
        with Server(options.model) as server:
            ready.append(server.ready_after)
            stream(server.url, [SampleRequest("Hello", 1, 1)])
            first.append(time.perf_counter() - began)
            if not idle:
                time.sleep(1)
                before = sum(map(_cpu_seconds, server.pids().values()))
                time.sleep(IDLE_SECONDS)
                idle.append((sum(map(_cpu_seconds, server.pids().values())) - before) / IDLE_SECONDS)
    found = {"ready": statistics.median(ready), "first_answer": statistics.median(first), "idle_cpu": idle[0]}
    print_table(["start, seconds", "ready", "first answer", "CPU while idle"], [["medians", *found.values()]])
    return found | {"rounds": {"ready": ready, "first_answer": first}}


def stream(url: str, requests: list[SampleRequest]) -> tuple[list[RequestResult], float]:
    """Send all requests at once; every one must be answered."""
    target = Target(url, "demo", extra_body={"ignore_eos": True, "temperature": 1.0, "cache_salt": str(time.time())})
    results, duration = run_loop(measure_serving(target, requests, [0.0] * len(requests), use_tqdm=False))
    failed = [result.error for result in results if not result.success]
    if failed:
        raise SystemExit(f"{len(failed)} requests failed: {failed[0]}")
    return results, duration


def prompts(model: str, count: int, input_len: int, output_len: int) -> list[SampleRequest]:
    """Random tokens, as ids."""
    from nanovllm.engine.tokenizer import Tokenizer
    from nanovllm.hub import resolve_model_path

    ids = text_token_ids(Tokenizer.load(resolve_model_path(model)))
    made: list[Any] = random_requests(ids, count, input_len, output_len)
    return [SampleRequest(each.prompt["prompt_token_ids"], each.prompt_len, output_len) for each in made]


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "NANOVLLM_LOGGING_LEVEL": "INFO"}


def _parts(text: str) -> Iterator[str]:
    for part in text.split(","):
        if part not in ("throughput", "delay", "start"):
            raise argparse.ArgumentTypeError(f"{part!r} is none of throughput, delay, start")
        yield part


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--streams", type=int, default=64, help="for throughput; delay takes a quarter (default: 64)")
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--only", type=lambda text: list(_parts(text)), default=["throughput", "delay", "start"])
    parser.add_argument("--output", type=Path, default=RESULTS / f"serve-{time.strftime('%Y-%m-%d')}.json")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--noting-server", help=argparse.SUPPRESS)
    options, _ = parser.parse_known_args()
    if options.engine:
        run_engine(options.model)
        return 0
    if options.noting_server:
        return run_noting_server(options.noting_server)
    requests = prompts(options.model, options.streams, options.input_len, options.output_len)
    found: dict[str, Any] = {}
    if "throughput" in options.only:
        found["throughput"] = throughput(options, requests)
    if "delay" in options.only:
        found["delay"] = delay(options, requests[: max(1, options.streams // 4)])
    if "start" in options.only:
        found["start"] = start(options)
    settings = {name: getattr(options, name) for name in ("model", "streams", "input_len", "output_len")}
    write_results(options.output, **settings, **found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
