"""The examples run on the model in the box and print what they promise."""

from __future__ import annotations

import io
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# name -> what its output must match
EXPECTED = {
    "quickstart": r"\w+",
    "batch": r"What is a KV cache\?\n  \w.*\n\d+ tokens in [\d.]+ s: \d+ per second\n$",
    "chat": r"^An empty line ends the conversation\.\n> \S.*\n> \S.*\n> $",
    "async_stream": r"^(first|second): ['\"].*second: that is enough\n.*first: ['\"]",
    "beam_search": r"^( +-\d+\.\d{3}  ['\"].+['\"]\n){4}$",
    "prefix_cache": r"\? 0 of (\d+) .*\? [1-9]\d+ of \1 .*slot\? [1-9]\d+ of .*after a reset: 0\n$",
}


def test_every_example_is_tested():
    assert {file.stem for file in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nWhat is a block?\n\n"))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert re.search(EXPECTED[name], capsys.readouterr().out, re.DOTALL)
