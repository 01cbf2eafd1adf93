"""What quantised weights cost in quality: perplexity, and agreement with bfloat16, of the model in the box.

    python benchmarks/quantisation_quality.py

The texts are answers to the held-out questions of the demo model, drawn from the bfloat16 model at temperature 1: what
a model itself would say is the only text that one of its size can judge.

- *perplexity* of those answers
- *top-1 agreement*: share of their positions at which the likeliest next token is the same as in bfloat16
- *same answers*: share of the questions that get the same greedy answer, token for token

``random`` is a model with random weights and wider layers: nothing in it has been trained to be robust.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import RESULTS, print_table, write_results
from workloads import QWEN3_0_6B

ROOT = Path(__file__).resolve().parents[1]
FORMATS = (None, "int8", "w8a8", "int4")
RANDOM = {**QWEN3_0_6B, "vocab_size": 4096, "num_hidden_layers": 4}


@dataclass
class Scores:
    """What one format makes of the texts: log-probability and likeliest token of every position, and its answers."""

    logprobs: list[list[float]]  # by text
    likeliest: list[list[int]]
    answers: list[list[int]]


def held_out_questions() -> list[str]:
    """The questions of the demo model's evaluation."""
    lines = (ROOT / "scripts" / "demo_data" / "held_out.txt").read_text(encoding="utf-8").splitlines()
    kept = [line.partition(":")[2] for line in lines if line and not line.startswith("#")]
    return [question.strip() for line in kept for question in line.split(";") if question.strip()]


def score(llm: Any, texts: list[list[int]], starts: list[int], prompts: list[list[int]], length: int) -> Scores:
    """Judge ``texts`` from position ``starts`` on, and answer ``prompts``."""
    from nanovllm import SamplingParams

    judged = llm.generate(texts, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1), use_tqdm=False)
    logprobs, likeliest = [], []
    for output, text, start in zip(judged, texts, starts, strict=True):
        entries = list(zip(output.prompt_logprobs, text, strict=True))[start:]
        logprobs.append([entry[token].logprob for entry, token in entries])
        likeliest.append([max(entry, key=lambda t: entry[t].logprob) for entry, _ in entries])
    answered = llm.generate(prompts, SamplingParams(max_tokens=length, temperature=0), use_tqdm=False)
    return Scores(logprobs, likeliest, [list(output.outputs[0].token_ids) for output in answered])


def compare(ours: Scores, base: Scores) -> dict[str, float]:
    """The figures of a format, ``base`` being bfloat16's."""
    logprobs = [x for text in ours.logprobs for x in text]
    pairs = [p for x, y in zip(ours.likeliest, base.likeliest, strict=True) for p in zip(x, y, strict=True)]
    return {
        "perplexity": math.exp(-sum(logprobs) / len(logprobs)),
        "top-1 agreement": sum(x == y for x, y in pairs) / len(pairs),
        "same answers": sum(x == y for x, y in zip(ours.answers, base.answers, strict=True)) / len(base.answers),
    }


def measure(model: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The figures of every format, for the model in the box (``demo``), ``random``, or a folder."""
    from nanovllm import LLM, SamplingParams

    scored: dict[str, Scores] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"model": model, "max_model_len": 2048, "max_num_seqs": 64}
        if model == "random":
            (Path(folder) / "config.json").write_text(json.dumps(RANDOM))
            settings |= {"model": folder, "load_format": "dummy", "tokenizer": "demo"}
        settings["dtype"] = "bfloat16"
        prompts: list[list[int]] = []
        for quantization in FORMATS:
            with LLM(quantization=quantization, **settings) as llm:
                if quantization is None:
                    tokenizer = llm.get_tokenizer()
                    for question in held_out_questions()[: options.questions]:
                        message = [{"role": "user", "content": question}]
                        prompts.append(tokenizer.apply_chat_template(message, add_generation_prompt=True))
                    params = SamplingParams(max_tokens=options.length, temperature=1.0, seed=0)
                    drawn = llm.generate(prompts, params, use_tqdm=False)
                    texts = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in drawn]
                    starts = [len(prompt) for prompt in prompts]
                scores = score(llm, texts, starts, prompts, options.length)
            scored[quantization or "bfloat16"] = scores
    return {name: compare(scores, scored["bfloat16"]) for name, scores in scored.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo", "random"], help="demo, random, or a folder")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--length", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--output", type=Path, default=RESULTS / "quantisation_quality.json")
    options = parser.parse_args()
    results = {model: measure(model, options) for model in options.models}
    rows = [[model, name, *figures.values()] for model, formats in results.items() for name, figures in formats.items()]
    head = list(next(iter(next(iter(results.values())).values())))
    print_table(["model", "weights", *head], [[*row[:2], *(f"{x:.4f}" for x in row[2:])] for row in rows])
    write_results(options.output, questions=options.questions, length=options.length, results=results)


if __name__ == "__main__":
    main()
