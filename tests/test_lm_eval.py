"""lm-eval's ``local-completions`` scores our server, on two tiny tasks of our own.

Its log-likelihoods must be those of the engine, and so must its generations. lm-eval brings some 650 MB with it, so it
is no development dependency; where it is in an environment of its own, ``LM_EVAL_PYTHON`` names that one's Python:

    python -m venv lm-eval && lm-eval/bin/pip install 'lm-eval[api]'
    LM_EVAL_PYTHON=lm-eval/bin/python python -m pytest tests/test_lm_eval.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import served

from nanovllm import LLM, SamplingParams

TASKS = Path(__file__).parent / "lm_eval_tasks"
PYTHON = os.environ.get("LM_EVAL_PYTHON") or (sys.executable if importlib.util.find_spec("lm_eval") else None)

pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="lm-eval is not installed, and LM_EVAL_PYTHON names no other Python"
)

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid"}
PROMPTS = ["The capital of France is", "Paged attention", "A cache is", "Tokens are"]


@pytest.fixture(scope="module")
def llm() -> Any:
    with LLM("demo", max_model_len=256, kv_cache_memory_bytes=16 << 20) as made:
        yield made


def evaluate(folder: Path, task: str, rows: list[dict[str, Any]], name: str) -> tuple[dict[str, Any], list[Any]]:
    """lm-eval's results of a task over these rows, and its samples in their order."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{task}.yaml").write_text((TASKS / f"{task}.yaml").read_text().replace("DATA", str(folder)))
    with served("demo", "--max-model-len", "256", "--enable-tokenizer-info-endpoint") as server:
        url = f"{server.url}/v1/completions"
        model = f"model=demo,base_url={url},num_concurrent=4,max_retries=1"
        model += ",tokenizer_backend=remote,tokenized_requests=False"
        command = [str(PYTHON), "-m", "lm_eval", "--model", "local-completions", "--model_args", model, "--tasks", task]
        command += ["--include_path", str(folder), "--output_path", str(folder / "out"), "--log_samples"]
        hidden = {"PYTHONPATH": "", "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **hidden}, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    [results] = (folder / "out").rglob("results_*.json")
    [samples] = (folder / "out").rglob(f"samples_{task}_*.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return json.loads(results.read_text())["results"][task], lines


def log_likelihood(llm: LLM, question: str, answer: str) -> float:
    """Of the tokens of the answer after the question."""
    start = len(llm.get_tokenizer().encode(question))
    [output] = llm.generate(f"{question} {answer}", SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    ids, positions = output.prompt_token_ids, output.prompt_logprobs
    return sum(positions[index][ids[index]].logprob for index in range(start, len(ids)))


def test_log_likelihoods_are_the_engines(llm: LLM, tmp_path: Path):
    choices = list(CAPITALS.values())
    rows = [
        {"question": f"The capital of {country} is", "choices": choices, "answer": choices.index(capital)}
        for country, capital in CAPITALS.items()
    ]
    results, samples = evaluate(tmp_path, "nanovllm_capitals", rows, "capitals")
    hits = 0
    for row, sample in zip(rows, samples, strict=True):
        expected = [log_likelihood(llm, str(row["question"]), choice) for choice in choices]
        found = [float(response[0][0]) for response in sample["resps"]]
        assert found == pytest.approx(expected, abs=0.02)
        hits += max(range(4), key=expected.__getitem__) == row["answer"]
    assert results["acc,none"] == pytest.approx(hits / 4)


def test_generations_are_the_engines(llm: LLM, tmp_path: Path):
    params = SamplingParams(temperature=0, max_tokens=24, stop=["."])
    answers = [output.outputs[0].text for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, answers, strict=True)]
    results, samples = evaluate(tmp_path, "nanovllm_copy", rows, "copy")
    assert [sample["resps"][0][0] for sample in samples] == answers
    assert results["exact_match,none"] == 1.0
