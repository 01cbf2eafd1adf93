"""The server as a process: start, addresses, clients that leave, signals, and an engine that dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import ROOT, Served, served, shared_server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG = {"prompt": "Hello", "max_tokens": 1900, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def narrow() -> Iterator[Served]:
    """One request at a time; all others wait."""
    with served("--max-num-seqs", "1") as server:
        yield server


def children(pid: int) -> list[int]:
    """Processes that another has started, by Linux's /proc."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nanovllm", "serve", *options]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=60, check=False)


def send_and_leave(server: Served, body: dict[str, object], wait: float) -> None:
    """Ask, and close the connection without reading an answer."""
    with pytest.raises(httpx.TimeoutException):
        httpx.post(server.url + COMPLETIONS, json=body, timeout=httpx.Timeout(10.0, read=wait))


# -- clients that leave -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_client_that_leaves_frees_the_engine_at_once(narrow: Served, stream: bool, n: int):
    body = {**LONG, "stream": stream, "n": n, "temperature": 1.0, "stream_interval": 5000}
    send_and_leave(narrow, body, 0.3)
    narrow.wait_until_idle(2.0)


def test_a_client_that_leaves_a_stream_it_was_reading_frees_the_engine(narrow: Served):
    with narrow.client.stream("POST", CHAT, json={**LONG, "messages": [{"role": "user", "content": "Hi"}],
                                                  "stream": True}) as answer:  # fmt: skip
        lines = answer.iter_lines()
        next(lines)
    narrow.wait_until_idle(2.0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_is_forgotten(narrow: Served, stream: bool):
    with narrow.client.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as running:
        lines = running.iter_lines()
        next(lines)
        send_and_leave(narrow, {**LONG, "stream": stream}, 0.2)
        deadline = time.monotonic() + 2
        while (state := narrow.client.get("/health").json())["num_waiting"] and time.monotonic() < deadline:
            time.sleep(0.02)
        assert state["num_waiting"] == 0 and state["num_running"] == 1
        next(lines)
    narrow.wait_until_idle(2.0)


def test_health_tells_of_work_that_stands_still(narrow: Served):
    state = narrow.client.get("/health").json()
    assert state["status"] == "ok" and state["last_step_age"] >= 0 and state["num_running"] == 0
    time.sleep(0.3)
    assert narrow.client.get("/health", params={"max_step_age": 0.1}).status_code == 200  # nothing to do
    for method in ("GET", "POST"):
        assert narrow.client.request(method, "/ping").status_code == 200


def test_load_counts_requests_under_way():
    with (
        served("--enable-server-load-tracking") as server,
        server.client.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        assert server.client.get("/load").json() == {"server_load": 1}


def test_an_idle_server_uses_no_processor_time():
    server = shared_server()
    server.wait_until_idle()
    time.sleep(0.5)
    pids = [server.process.pid, *children(server.process.pid)]

    def ticks() -> int:
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split() for pid in pids]
        return sum(int(stat[11]) + int(stat[12]) for stat in stats)

    before = ticks()
    time.sleep(3.0)
    assert (ticks() - before) / os.sysconf("SC_CLK_TCK") <= 0.03


def test_the_front_process_has_no_torch():
    server = shared_server()
    (engine,) = children(server.process.pid)
    front, behind = (Path(f"/proc/{pid}/maps").read_text() for pid in (server.process.pid, engine))
    assert "libtorch" not in front and "libtorch" in behind


# -- addresses --------------------------------------------------------------------------------------------------------


def test_a_unix_socket_serves_and_goes_with_the_server(tmp_path: Path):
    path = tmp_path / "socket"
    with served("--uds", str(path)) as server:
        assert server.client.get("/v1/models").json()["data"][0]["id"] == "demo"
        assert path.is_socket()
    assert not path.exists()


def test_a_port_in_use_is_an_error_of_one_line_before_a_model_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("--host", "127.0.0.1", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("nanovllm: error: cannot serve on 127.0.0.1:") and "in use" in done.stderr


def test_https(tmp_path: Path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    try:
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    with served("--ssl-keyfile", str(key), "--ssl-certfile", str(certificate)) as server:
        assert server.url.startswith("https://") and server.client.get("/version").status_code == 200


def test_a_model_that_cannot_be_loaded_is_an_error_of_one_line():
    done = run("/no/such/folder", "--port", "0")
    assert done.returncode == 2 and done.stderr.startswith("nanovllm: error: "), done.stderr


def test_the_older_module_is_the_same_server():
    command = [sys.executable, "-m", "nanovllm.entrypoints.openai.api_server", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and "serve [MODEL] [options]" in done.stdout


def test_the_key_may_come_from_the_environment():
    with served(VLLM_API_KEY="secret") as server:
        assert server.client.get("/v1/models").status_code == 401
        assert server.client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


# -- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once(number: int):
    server = Served((), {})
    assert server.ask(COMPLETIONS, {"prompt": "x", "max_tokens": 1})
    (engine,) = children(server.process.pid)
    assert server.stop(number) == 0
    assert not Path(f"/proc/{engine}").exists()


def test_requests_under_way_are_answered_before_the_end():
    server = Served((), {})
    answers: list[httpx.Response] = []
    body = {**LONG, "max_tokens": 300}
    thread = threading.Thread(target=lambda: answers.append(server.post(COMPLETIONS, body)))
    thread.start()
    while not httpx.get(server.url + "/health").json()["num_running"]:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    thread.join()
    assert answers[0].json()["usage"]["completion_tokens"] == 300
    assert server.stop() == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")


def test_requests_that_take_too_long_are_cut_off():
    server = Served(("--shutdown-timeout", "0"), {})
    with pytest.raises(httpx.HTTPError), server.client.stream("POST", COMPLETIONS,
                                                              json={**LONG, "stream": True}) as answer:  # fmt: skip
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        for _ in lines:
            pass
    assert server.process.wait(5) == 0


def test_an_engine_that_dies_is_started_again():
    with served("--max-engine-restarts", "1") as server:
        (engine,) = children(server.process.pid)
        with server.client.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(engine, signal.SIGKILL)
            rest = [line for line in lines if line]
        assert '"error"' in rest[-2] and rest[-1] == "data: [DONE]"
        deadline = time.monotonic() + 30
        while server.client.get("/health").status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert server.ask(COMPLETIONS, {"prompt": "x", "max_tokens": 2})["usage"]["completion_tokens"] == 2


def test_an_engine_that_dies_for_good_ends_the_server_with_a_code_of_its_own():
    server = Served(("--max-engine-restarts", "0"), {})
    (engine,) = children(server.process.pid)
    os.kill(engine, signal.SIGKILL)
    assert server.process.wait(10) == 70
    assert "The engine has stopped" in server.log
    server.client.close()
