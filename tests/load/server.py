"""The server under test: started, watched and ended."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .client import get, send
from .engine import VARIABLE, EngineSettings

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT = 120.0  # seconds


@dataclasses.dataclass
class Footprint:
    """What a process holds."""

    rss: int  # bytes
    files: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        folder = Path(f"/proc/{pid}")
        rss = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return cls(rss, len(list((folder / "fd").iterdir())), len(list((folder / "task").iterdir())))


class LoadServer:
    """A server on a free port of this machine.

    Args:
        options: of ``nanovllm serve``.
        engine: how the engine behaves; None: the real one, with the model in the box.
    """

    def __init__(self, *options: str, engine: EngineSettings | None = None) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        program = ["-m", "nanovllm", "serve"] if engine is None else ["-m", "load.front"]
        command = [sys.executable, *program, "--host", "127.0.0.1", "--port", "0", "--disable-uvicorn-access-log"]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment = {**os.environ, "PYTHONPATH": path, "NANOVLLM_LOGGING_LEVEL": "INFO"}
        if engine is not None:
            environment[VARIABLE] = json.dumps(dataclasses.asdict(engine))
        self.process = subprocess.Popen([*command, *options], stdout=self._log, stderr=self._log, env=environment)
        self.port = self._await_start()

    def __enter__(self) -> LoadServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """What the server has written."""
        self._log.seek(0)
        return self._log.read()

    @property
    def engine_pid(self) -> int:
        """Of the engine's process; 0 while there is none."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def footprints(self) -> dict[str, Footprint]:
        """What the server's processes hold now."""
        return {"front": Footprint.of(self.process.pid), "engine": Footprint.of(self.engine_pid)}

    async def health(self) -> dict[str, Any]:
        """The answer of /health; without ``status`` "ok" if that is an error."""
        answer = await send(self.port, get("/health"))
        found: dict[str, Any] = json.loads(answer.body or b"{}")
        return found

    async def metrics(self) -> dict[str, float]:
        """All metrics by name and labels."""
        answer = await send(self.port, get("/metrics"))
        lines = [line.rpartition(" ") for line in answer.body.decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    async def idle(self, seconds: float = 30.0) -> None:
        """Wait until nothing is under way; then no request may hold a block, and only this connection be open."""
        deadline = time.monotonic() + seconds
        while (state := await self.health()).get("status") != "ok" or state["num_running"] + state["num_waiting"]:
            assert time.monotonic() < deadline, f"the server does not come to rest: {state}"
            await asyncio.sleep(0.05)
        metrics = await self.metrics()
        (usage,) = [value for name, value in metrics.items() if name.startswith("vllm:kv_cache_usage_perc")]
        assert usage == 0, f"{usage:.1%} of the blocks are held although nothing is under way"

    def stop(self) -> int:
        """End it as an operator does; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()

    def _await_start(self) -> int:
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline and self.process.poll() is None:
            log = self.log
            if "Application startup complete." in log:
                line = next(line for line in log.splitlines() if " Serving " in line)
                return int(line.rpartition(":")[2])
            time.sleep(0.02)
        self.process.kill()
        raise AssertionError(f"the server does not start:\n{self.log}")
