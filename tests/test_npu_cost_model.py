"""The arithmetic of benchmarks/npu_cost_model.py, against a simulation and against numbers worked out by hand."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {
    "vocab_size": 100, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4,
}  # fmt: skip


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import npu_cost_model

    return npu_cost_model


def simulate(lengths: list[tuple[int, int]], at_once: int) -> tuple[int, int]:
    """(steps, tokens of history read) of running the requests step by step."""
    waiting, running, steps, read = list(lengths), [], 0, 0
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append([waiting.pop(0), 0])
        for entry in running:
            (prompt, _), done = entry
            if done:  # its first token came with the prompt
                read += prompt + done
            entry[1] += 1
        running = [entry for entry in running if entry[1] < entry[0][1]]
        steps += 1
    return steps, read


@pytest.mark.parametrize("at_once", [1, 2, 3, 8])
def test_steps_and_bytes_are_those_of_a_simulation(model: Any, at_once: int) -> None:
    draw = random.Random(at_once)
    lengths = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(7)]
    steps, read = simulate(lengths, at_once)
    load = model.work(lengths, at_once, SHAPE)
    weights = 2 * (8 * 4 * (2 * 2 + 2 * 1) + 3 * 8 * 16) + 100 * 8
    history = 2 * 1 * 4 * 2 * 2  # keys and values, one head of 4, two layers, two bytes
    assert load.steps == steps and load.output_tokens == sum(output for _, output in lengths)
    assert load.bytes_read == pytest.approx(read * history + steps * weights * 2)


def test_operations_of_a_prompt_by_hand(model: Any) -> None:
    load = model.work([(3, 1)], 1, SHAPE)
    layers, head, pair = 2 * (192 + 384), 800, 4 * 2 * 4 * 2
    assert load.operations == 2 * layers * 3 + 2 * head + pair * (3 * 4 / 2)


def test_time_is_bytes_over_rate_plus_operations_over_rate_plus_steps(model: Any) -> None:
    load = model.Work(steps=10, bytes_read=2e9, operations=3e12, output_tokens=100)
    device = model.Device("d", 1e9, 1e12)
    assert model.tokens_per_s(device, load, model.LIMIT) == pytest.approx(100 / 5)
    assumed = model.Assumptions(of_bandwidth=0.5, of_operations=0.25, step_s=0.1)
    assert model.tokens_per_s(device, load, assumed) == pytest.approx(100 / (4 + 12 + 1))


def test_the_published_figures_are_within_the_limit(model: Any) -> None:
    """A limit that is beaten is none."""
    from workloads import QWEN3_0_6B, nano_requests

    prompts, outputs = nano_requests(256, 1024)
    assert sum(outputs) == 133_966
    lengths = list(zip(map(len, prompts), outputs, strict=True))
    for at_once, published in model.PUBLISHED_910C.items():
        load = model.work(lengths, at_once, QWEN3_0_6B)
        assert published < model.tokens_per_s(model.DEVICES[0], load, model.LIMIT)


@pytest.mark.parametrize("page", ["ascend.md", "ascend.zh-CN.md"])
def test_the_table_in_the_documents_is_what_the_command_prints(page: str) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/npu_cost_model.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    printed = [re.findall(r"[\d,]+", line) for line in done.stdout.splitlines() if re.match(r"\s*\d+\s", line)]
    rows = [
        re.findall(r"[\d,]+", line)
        for line in (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
        if re.match(r"\| (16|32|48|64|128|256) \|", line)
    ]
    assert len(printed) == 6 and rows == printed
