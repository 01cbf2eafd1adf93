"""Where the emulation cannot run, tests skip and say why; where a test takes its process down, only that test fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.npu.emulator import environment


def _pytest(folder: Path, **variables: str) -> str:
    """What pytest prints for a folder of tests that uses this folder's conftest."""
    (folder / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(environment.ROOT)!r})\nfrom tests.npu.conftest import *\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-rsf", "-p", "no:cacheprovider", str(folder)]
    result = subprocess.run(command, env={**os.environ, **variables}, cwd=folder, capture_output=True, text=True)
    return result.stdout


def test_without_the_wheel_tests_skip_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.emulated\ndef test_on_the_device():\n    assert False\n"
    )
    out = _pytest(tmp_path, NANOVLLM_NPU_HOME=str(tmp_path / "empty"), NANOVLLM_NPU_DOWNLOAD="0")
    assert "1 skipped" in out
    assert "NANOVLLM_NPU_DOWNLOAD=0 forbids to download it" in out


@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("sys.platform", "darwin", "needs Linux on x86-64, not darwin"),
        ("platform.machine", lambda: "aarch64", "needs Linux on x86-64, not linux on aarch64"),
        ("shutil.which", lambda tool: None if tool == "gcc" else tool, "needs gcc"),
        ("importlib.metadata.version", lambda package: "2.11.0+cpu", "needs torch 2.13.0, found 2.11.0"),
    ],
)
def test_what_is_missing_is_named(
    name: str, value: object, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NANOVLLM_NPU_DOWNLOAD", "0")
    monkeypatch.setattr(f"tests.npu.emulator.environment.{name}", value)
    found = environment.why_not()
    assert found is not None and reason in found


def test_a_test_that_takes_its_process_down_fails_alone(tmp_path: Path) -> None:
    if reason := environment.why_not():
        pytest.skip(reason)
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "pytestmark = pytest.mark.emulated\n"
        "def test_before(): pass\n"
        "def test_crash(): os.abort()\n"
        "def test_wrong(): assert 'npu' == 'cpu'\n"
        "def test_behind(): pass\n"
    )
    out = _pytest(tmp_path)
    assert "2 failed, 2 passed" in out
    assert "the process ended (-6) in this test" in out
    assert "assert 'npu' == 'cpu'" in out
