"""Tests marked ``emulated`` run in processes on the emulated Ascend; pytest reports them as if they ran here.

``@pytest.mark.emulated(soc="Ascend310P3", lazy=1)`` names the settings of README.md; tests with equal settings share
a process. The environment must not change once torch is imported, hence the second pytest instead of a fixture. A test
that takes its process down fails, and the tests behind it get a new one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.npu.emulator import environment  # noqa: E402

INSIDE = os.environ.get("NANOVLLM_NPU_EMULATED") == "1"
_REPORTS = os.environ.get("NANOVLLM_NPU_REPORTS")


@lru_cache
def _why_not() -> str | None:
    return environment.why_not()


def _settings(item: pytest.Item) -> dict[str, object] | None:
    marker = item.get_closest_marker("emulated")
    return None if marker is None or INSIDE else marker.kwargs


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "emulated(**settings): run on the emulated Ascend (tests/npu/README.md)")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _settings(item) is not None and (reason := _why_not()):
        pytest.skip(reason)


# ---- inside: hand the reports out --------------------------------------------------------------------------------

if INSIDE and _REPORTS:

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
        outcome = yield
        report = item.config.hook.pytest_report_to_serializable(config=item.config, report=outcome.get_result())
        with open(_REPORTS, "a") as file:
            file.write(json.dumps(report) + "\n")


# ---- outside: run them, and show their reports --------------------------------------------------------------------


class _Process:
    """A pytest on the emulation, and its reports as they come."""

    def __init__(self, items: list[pytest.Item], settings: dict[str, object]) -> None:
        self.reports = tempfile.NamedTemporaryFile("r", suffix=".jsonl")  # noqa: SIM115  (lives as long as this)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        variables = environment.variables(**settings)
        variables.update(NANOVLLM_NPU_REPORTS=self.reports.name, OMP_NUM_THREADS="1")
        command = [sys.executable, "-X", "faulthandler", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [item.nodeid for item in items]
        root = items[0].config.rootpath
        self.process = subprocess.Popen(command, env=variables, cwd=root, stdout=self.log, stderr=subprocess.STDOUT)

    def next_report(self) -> dict | None:
        """The next report, or None if the process ended without it."""
        ended = False
        while True:
            line = self.reports.readline()
            if line.endswith("\n"):
                return json.loads(line)
            if ended:
                return None
            try:
                self.process.wait(0.05)
                ended = True
            except subprocess.TimeoutExpired:
                pass

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()[-4000:]


_processes: dict[str, _Process | None] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    settings = _settings(item)
    if settings is None or _why_not():
        return None
    key = json.dumps(settings, sort_keys=True)
    if _processes.get(key) is None:
        group = [other for other in item.session.items if _settings(other) == settings]
        _processes[key] = _Process(group[group.index(item) :], settings)
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports_of(item, key):
        hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    item.session._setupstate.teardown_exact(nextitem)  # fixtures of a module before, kept for this item
    return True


def _reports_of(item: pytest.Item, key: str) -> Iterator[pytest.TestReport]:
    process = _processes[key]
    assert process is not None
    when = None
    while when != "teardown":
        data = process.next_report()
        if data is None:
            _processes[key] = None
            text = f"the process ended ({process.process.returncode}) in this test:\n{process.output()}"
            yield pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")
            return
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
        assert report.nodeid == item.nodeid, f"{report.nodeid} reported where {item.nodeid} was expected"
        when = report.when
        yield report


def pytest_sessionfinish() -> None:
    for process in _processes.values():
        if process is not None and process.process.poll() is None:
            try:
                process.process.wait(10)
            except subprocess.TimeoutExpired:
                process.process.kill()
