"""Servers for tests: ``python -m nanovllm serve`` as users start it, on a free port of this machine.

server = shared_server()                                   # the demo model; one for the whole test run
with served("--api-key", "secret") as server: ...          # one of its own
server.url, server.port, server.post(path, json), server.stream(path, json), server.client (httpx)
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx

import nanovllm

ROOT = Path(nanovllm.__file__).parents[1]
START_LIMIT = 120.0  # seconds; for machines that do much else


class Served:
    """A running server.

    Attributes:
        url: such as ``http://127.0.0.1:1234``.
        client: sends requests to it.
        process: the server.
        prefix: a program that starts it.
    """

    prefix: tuple[str, ...] = ()

    def __init__(self, options: tuple[str, ...], environment: dict[str, str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [*self.prefix, sys.executable, "-m", "nanovllm", "serve", *options]
        if "--port" not in options and "--uds" not in options:
            command += ["--host", "127.0.0.1", "--port", "0"]
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "NANOVLLM_LOGGING_LEVEL": "INFO", **environment}
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=variables)
        self.url = self._await_start()
        uds = self.url.removeprefix("unix:") if self.url.startswith("unix:") else None
        transport = httpx.HTTPTransport(uds=uds) if uds else None
        self.base = "http://server" if uds else self.url
        self.client = httpx.Client(base_url=self.base, timeout=60, transport=transport, verify=False)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def log(self) -> str:
        """What the server has written."""
        self._log.seek(0)
        return self._log.read()

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def ask(self, path: str, body: Any, **options: Any) -> Any:
        """The JSON of a successful answer."""
        answer = self.post(path, body, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stream(self, path: str, body: Any, **options: Any) -> list[Any]:
        """The data of a stream's events; it must end with ``[DONE]``, which is left out."""
        lines = self.stream_lines(path, body, **options)
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert data[-1] == "[DONE]", data
        return [json.loads(each) for each in data[:-1]]

    def stream_lines(self, path: str, body: Any, **options: Any) -> list[str]:
        """All lines of a stream."""
        with self.client.stream("POST", path, json={**body, "stream": True}, **options) as answer:
            text = answer.read().decode()
            assert answer.status_code == 200, text
            assert answer.headers["content-type"].startswith("text/event-stream")
        return text.split("\n")

    def wait_until_idle(self, seconds: float = 10.0) -> None:
        """Until the engine has no requests."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = self.client.get("/health").json()
            if state["num_running"] + state["num_waiting"] == 0:
                return
            time.sleep(0.02)
        raise AssertionError(f"the engine is still busy: {state}")

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30.0) -> int:
        """Send a signal and wait for the end; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()
            self.client.close()

    def _await_start(self) -> str:
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline:
            log = self.log
            if "Application startup complete." in log:
                return next(line for line in log.splitlines() if " Serving " in line).rpartition(" on ")[2].strip()
            if self.process.poll() is not None:
                raise AssertionError(f"the server has ended with {self.process.returncode}:\n{log}")
            time.sleep(0.02)
        self.process.kill()
        raise AssertionError(f"the server does not start:\n{self.log}")


@contextlib.contextmanager
def served(*options: str, **environment: str) -> Iterator[Served]:
    """A server with these options and variables; it ends with the block."""
    server = Served(options, environment)
    try:
        yield server
    finally:
        server.stop()


@functools.cache
def shared_server(*options: str) -> Served:
    """The one server with these options that all tests of a run share."""
    server = Served(options, {})
    atexit.register(server.stop)
    return server


def chained(lists: Iterable[list[Any]]) -> list[Any]:
    """All items of the lists, in order."""
    return list(itertools.chain.from_iterable(lists))


def parsing_server() -> Served:
    """A shared server that parses reasoning and tool calls."""
    return shared_server(
        "--reasoning-parser", "qwen3", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
        "--enable-prompt-tokens-details", "--response-role", "assistant",
    )  # fmt: skip


def named_events(server: Served, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream; every one is named like its data."""
    text = "\n".join(server.stream_lines(path, body))
    events = []
    for block in filter(None, text.split("\n\n")):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events
