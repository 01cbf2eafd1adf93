"""Faults outside the engine: clients that stall, too many connections, a full disk, a clock that jumps."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import ROOT, Served, served

from nanovllm.entrypoints.cli.main import main

COMPLETIONS = "/v1/completions"
TIMEOUT = 2.0
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts on Linux's sockets and devices")


@pytest.fixture(scope="module")
def impatient() -> Iterator[Served]:
    """A server that soon leaves clients that do nothing."""
    with served("--client-timeout", str(TIMEOUT)) as server:
        yield server


def connect(server: Served) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    client.settimeout(30)
    client.connect(("127.0.0.1", server.port))
    return client


def received_from(client: socket.socket) -> bytes:
    """All that comes until the server closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := client.recv(1 << 20):
            received += data
    return received


def faults(server: Served, name: str) -> int:
    """As /health says, and the metrics too."""
    found = server.client.get("/health").json()["faults"].get(name, 0)
    line = next(
        line
        for line in server.client.get("/metrics").text.splitlines()
        if f'nanovllm:faults_total{{fault="{name}"' in line
    )
    assert float(line.split()[-1]) >= found  # it came later
    return int(found)


# Answers of more bytes than the kernel's buffers take.
COUNT = 250
LARGE = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * COUNT


def test_a_client_that_takes_nothing_is_left_and_others_do_not_notice(impatient: Served):
    assert len(impatient.client.get("/openapi.json").content) * COUNT > 10 << 20
    before = faults(impatient, "client_stalled")
    with connect(impatient) as client:
        client.sendall(LARGE)
        deadline = time.monotonic() + 60
        while faults(impatient, "client_stalled") == before and time.monotonic() < deadline:
            assert impatient.ask(COMPLETIONS, {"prompt": "x", "max_tokens": 2})
            time.sleep(0.1)
        assert received_from(client).count(b" 200 OK") < COUNT
    assert faults(impatient, "client_stalled") == before + 1
    assert impatient.log.count("clients were left") >= 1


def test_a_client_that_reads_slowly_gets_all_of_its_answer(impatient: Served):
    before = faults(impatient, "client_stalled")
    with connect(impatient) as client:
        client.sendall(LARGE)
        count, carry, start = 0, b"", time.monotonic()
        while count < COUNT:
            slow = time.monotonic() - start < 3 * TIMEOUT
            data = client.recv(1 << 14 if slow else 1 << 20)
            assert data
            count += (carry + data).count(b" 200 OK")
            carry = data[-6:]
            time.sleep(0.05 if slow else 0)
    assert faults(impatient, "client_stalled") == before


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"],
    ids=["nothing", "half a head", "half a body"],
)
def test_a_client_that_does_not_send_its_request_is_left(impatient: Served, sent: bytes):
    with connect(impatient) as client:
        client.sendall(sent)
        start = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
        assert TIMEOUT - 1 < time.monotonic() - start < 10 * TIMEOUT


def test_half_a_second_request_counts_too(impatient: Served):
    get = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(impatient) as client:
        client.sendall(get + get[:9])
        received = received_from(client)
        assert received.count(b" 200 OK") == 1 and received.endswith(b"}")


def test_a_request_that_runs_long_is_not_left(impatient: Served):
    body = {"prompt": "Hello", "max_tokens": 1900, "ignore_eos": True, "n": 2, "stream": True, "stream_interval": 5000}
    before = faults(impatient, "client_stalled")
    with impatient.client.stream("POST", COMPLETIONS, json=body) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and faults(impatient, "client_stalled") == before


def test_bodies_that_are_refused_leave_no_memory_behind(impatient: Served):
    def resident() -> int:
        return int(Path(f"/proc/{impatient.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def chunks() -> Iterator[bytes]:
        for _ in range(33):
            yield b"x" * (1 << 20)

    before = resident()
    for _ in range(6):
        with contextlib.suppress(httpx.WriteError):  # it need not be read to its end
            answer = impatient.client.post(COMPLETIONS, content=chunks(), headers={"Content-Type": "application/json"})
            assert answer.status_code == 413
        answer = impatient.client.post(
            COMPLETIONS, content=b"[" * (8 << 20), headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400
    assert resident() - before < 80 << 20  # 240 MB have come


# -- connections -----------------------------------------------------------------------------------------------------


class Narrow(Served):
    """A server that may not have many files open."""

    prefix = (
        sys.executable, "-c",
        "import os, resource as r, sys; r.setrlimit(r.RLIMIT_NOFILE, (320, 320)); os.execv(sys.argv[1], sys.argv[1:])",
    )  # fmt: skip


def test_connections_that_there_is_no_room_for_get_an_answer_and_room_comes_back():
    server = Narrow((), {})
    most = 320 - 256
    try:
        assert f"room for {most} connections" in server.log
        assert server.ask(COMPLETIONS, {"prompt": "x", "max_tokens": 2})  # one connection stays open
        clients = [connect(server) for _ in range(100)]
        time.sleep(1.0)
        ready, _, _ = select.select(clients, [], [], 0)
        answers = [received_from(client) for client in ready]
        assert len(answers) == 100 - (most - 1)
        for answer in answers:
            head, body = answer.split(b"\r\n\r\n")
            assert b" 503 " in head and b"Retry-After: 1" in head and json.loads(body)["error"]["code"] == 503
        assert server.ask(COMPLETIONS, {"prompt": "x", "max_tokens": 2})
        for client in clients:
            client.close()
        time.sleep(0.2)
        assert httpx.get(server.url + "/version").status_code == 200
        assert faults(server, "connections_full") == len(answers)
        assert server.log.count("The server is full") == 1
        assert "Traceback" not in server.log
    finally:
        server.stop()


# -- the disk --------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_log_that_cannot_be_written_stops_nothing():
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "nanovllm", "serve", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NANOVLLM_LOGGING_LEVEL": "DEBUG"}
    with (
        open("/dev/full", "w") as full,
        subprocess.Popen(command, stdout=full, stderr=full, env=environment) as process,
    ):
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(url + "/health").status_code == 200:
                        break
                time.sleep(0.1)
            answer = httpx.post(url + COMPLETIONS, json={"prompt": "x", "max_tokens": 2, "temperature": 0}, timeout=60)
            assert answer.json()["usage"]["completion_tokens"] == 2
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_a_full_disk_under_the_answers_of_a_batch_is_told_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    batch = tmp_path / "in.jsonl"
    body = {"model": "demo", "prompt": "x", "max_tokens": 1}
    batch.write_text(json.dumps({"custom_id": "1", "method": "POST", "url": COMPLETIONS, "body": body}) + "\n")
    os.symlink("/dev/full", tmp_path / "out.jsonl.part")
    assert main(["run-batch", "-i", str(batch), "-o", str(tmp_path / "out.jsonl"), "--model", "demo"]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("nanovllm: error: ") and os.strerror(errno.ENOSPC) in last


def test_a_full_disk_under_standard_output_is_told_in_one_line():
    command = [sys.executable, "-m", "nanovllm", "generate", "hello", "--max-tokens", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"nanovllm: error: {os.strerror(errno.ENOSPC)}"


# -- the clock -------------------------------------------------------------------------------------------------------

JUMPING = """
import itertools, time
real, jumps = time.time, itertools.cycle([0, 86400, -86400, 3, -7200])
time.time = lambda: real() + next(jumps)
"""


def test_a_clock_that_jumps_changes_no_duration(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(JUMPING)
    with served("--client-timeout", "5", "--request-timeout", "60", PYTHONPATH=f"{tmp_path}:{ROOT}") as server:
        assert server.process.poll() is None
        created = {server.ask(COMPLETIONS, {"prompt": "x", "max_tokens": 4})["created"] for _ in range(8)}
        assert max(created) - min(created) > 80000  # it does jump
        server.stream(COMPLETIONS, {"prompt": "x", "max_tokens": 50, "ignore_eos": True})
        time.sleep(1.5)
        state = server.client.get("/health", params={"max_step_age": 60}).json()
        assert state["status"] == "ok" and not state["faults"] and 0 <= state["last_step_age"] < 60
        for line in server.client.get("/metrics").text.splitlines():
            if "_seconds_sum" in line:
                assert 0 <= float(line.split()[-1]) < 120, line


def test_durations_are_counted_by_a_clock_that_does_not_jump():
    """The time of day is only told to users: where it is asked for, it is named so."""
    told = ("created", "arrival_time", "strftime")
    for file in (ROOT / "nanovllm").rglob("*.py"):
        for line in file.read_text(encoding="utf-8").splitlines():
            if "time.time()" in line or "datetime.now" in line:
                assert any(name in line for name in told) or file.name == "completions.py", f"{file}: {line}"


def test_the_event_loop_names_a_connection_that_it_cannot_accept_once(caplog: pytest.LogCaptureFixture):
    from nanovllm.engine.stats import EngineStats
    from nanovllm.entrypoints.serve.connections import Connections

    class Loop:
        others = 0

        def default_exception_handler(self, context: dict[str, Any]) -> None:
            self.others += 1

    stats, loop = EngineStats(), Loop()
    connections = Connections(stats, 0, None)
    fault = {"message": "socket.accept() out of system resource", "exception": OSError(errno.EMFILE, "Too many")}
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            connections.judge(loop, fault)  # type: ignore[arg-type]
        connections.judge(loop, {"exception": ValueError()})  # type: ignore[arg-type]
    assert len(caplog.records) == 1 and stats.faults["connections_full"] == 100 and loop.others == 1
