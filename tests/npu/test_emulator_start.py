"""How an engine on the emulated Ascend starts: how long it takes, and which devices it sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.emulated

START = """
import json, os
from nanovllm import LLM, SamplingParams
from nanovllm.hub import DEMO_PATH
with LLM(str(DEMO_PATH), device="npu", max_model_len=256) as llm:
    output = llm.generate(["Hello"], SamplingParams(max_tokens=1, temperature=0.0), use_tqdm=False)[0].outputs[0]
    print(json.dumps({"seconds": sum(os.times()[:2]), "tokens": len(output.token_ids)}))
"""


def run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command, environment = [sys.executable, "-c", program], {**os.environ, **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_engine_has_its_first_token_within_five_seconds() -> None:
    """Of processor time, from the first import on: on a machine with nothing else to do the clock says the same."""
    done = run(START, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens"] == 1 and found["seconds"] <= 5, found


@pytest.mark.parametrize(("visible", "count"), [("1", 1), ("0,1", 2), ("", 0)])
def test_an_engine_sees_the_devices_that_are_visible(visible: str, count: int) -> None:
    """Asked of CANN, without torch, and of torch_npu."""
    program = "from nanovllm.platforms.npu_driver import ask_cann; import sys; count = ask_cann().count; "
    program += "assert 'torch' not in sys.modules; import torch, torch_npu; print(count, torch.npu.device_count())"
    done = run(program, ASCEND_RT_VISIBLE_DEVICES=visible)
    assert done.stdout.splitlines()[-1].split() == [str(count)] * 2, done.stderr


def test_without_a_visible_device_the_engine_says_what_hides_them() -> None:
    done = run(START, ASCEND_RT_VISIBLE_DEVICES="")
    assert done.returncode != 0 and "no NPU is visible" in done.stderr and "ASCEND_RT_VISIBLE_DEVICES" in done.stderr
