"""The page on serving: its curl lines work, its tables are complete."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
from typing import Any

import pytest
from serving import ROOT, shared_server

from nanovllm.entrypoints.serve.args import ServeArgs
from nanovllm.entrypoints.serve.errors import NAMES
from nanovllm.entrypoints.serve.protocol.chat import ChatCompletionRequest
from nanovllm.entrypoints.serve.protocol.completions import CompletionRequest

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
CURL_LINES = re.findall(r"^curl .*$", PAGE, re.MULTILINE)
# Described as a group, or of no effect by themselves.
NOT_NAMED = {"model", "presence_penalty", "frequency_penalty", "repetition_penalty", "best_of", "add_special_tokens",
             "skip_special_tokens", "spaces_between_special_tokens", "guided_decoding_backend"}  # fmt: skip


@pytest.mark.parametrize("line", CURL_LINES)
def test_curl_lines_are_answered(line: str):
    words = shlex.split(line.replace("http://localhost:8000", shared_server().url))
    done = subprocess.run([*words, "--silent", "--show-error", "--fail-with-body"], capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    assert done.returncode == 0 and done.stdout, done
    assert '"error": {' not in done.stdout


def test_every_option_is_described_with_its_default():
    described = dict(re.findall(r"^\| `--([a-z0-9-]+)` \| (.*?) \|", PAGE, re.MULTILINE))
    assert list(described) and set(described) == {
        field.name.replace("_", "-") for field in dataclasses.fields(ServeArgs)
    }
    for name, value in dataclasses.asdict(ServeArgs()).items():
        assert described[name.replace("_", "-")].strip("` ") == shown(value), name


def shown(value: Any) -> str:
    if value is None or value is False or value == [] or value == {}:
        return ""
    return "on" if value is True else f"{value:g}" if isinstance(value, float) else str(value)


def test_every_field_is_described():
    named = set(re.findall(r"`(\w+)`", PAGE))
    fields = {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields} - NOT_NAMED
    assert fields <= named, fields - named


def test_every_kind_of_error_is_described():
    described = set(re.findall(r"^\| \d+ \| `(\w+)` \|", PAGE, re.MULTILINE))
    assert set(NAMES.values()) - {"MethodNotAllowedError", "NotImplementedError"} <= described
