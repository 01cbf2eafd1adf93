"""Collects the facts of this project that the demo model states, from the code.

    python -m demo_data.facts        # in scripts/: writes facts.json

The next training says what is in ``facts.json``; a test fails when the code has moved on.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What answers call planned, by the beginning of its row in the table of features.
PLANNED = ("tensor, pipeline",)


def collect() -> dict[str, str]:
    """The facts by name, as they are put into answers.

    Raises:
        ValueError: something that the answers call planned is not.
    """
    sys.path.insert(0, str(ROOT))
    from nanovllm.config import EngineArgs
    from nanovllm.entrypoints.serve.args import ServeArgs
    from nanovllm.hub import DEMO_MODEL
    from nanovllm.sampling_params import SamplingParams

    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    args, params, config = EngineArgs(), SamplingParams(), EngineArgs().build()
    facts = {
        "name": "nano-vLLM-Ascend",
        "package": _find(r'^name = "(.*)"', project),
        "module": SamplingParams.__module__.split(".")[0],
        "licence": _find(r'^license = "(.*)"', project),
        "python": _find(r'^requires-python = ">=(.*)"', project),
        "torch": _find(r'"torch>=(.*?)"', project),
        "block_size": config.cache.block_size,
        "port": ServeArgs().port,
        "default_model": DEMO_MODEL,
        "max_logprobs": args.max_logprobs,
        "policy": args.scheduling_policy,
        "size": "four million",
        "size_zh": "四百万",
    }
    for name in ("temperature", "top_p", "top_k", "min_p", "max_tokens", "repetition_penalty", "n"):
        facts[name] = getattr(params, name)
    features = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    for row in PLANNED:
        if not re.search(rf"^\| {re.escape(row)}[^|]*\| planned", features, re.MULTILINE):
            raise ValueError(f"answers call {row!r} planned, docs/features.md does not: change the answers")
    return {name: str(value) for name, value in facts.items()}


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise ValueError(f"nothing matches {pattern}")
    return found[1]


if __name__ == "__main__":
    path = Path(__file__).with_name("facts.json")
    path.write_text(json.dumps(collect(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))
