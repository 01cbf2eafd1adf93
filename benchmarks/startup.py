"""Time from typing a command to its answer, each in a fresh process.

    python benchmarks/startup.py

- ``python -c pass`` and ``import torch`` stand beside, as what cannot be undercut
- ``first token``: until the first byte of the answer is on standard output
- ``whole``: until the process has ended
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from report import RESULTS, print_table, write_results

IN_PYTHON = {
    "python -c pass": "pass",
    "import torch": "import torch",
    "import nanovllm": "import nanovllm",
    "LLM(), ready": "from nanovllm import LLM; LLM('{model}')",
}


def commands(model: str) -> dict[str, list[str]]:
    """What is timed, by the name it has in the table."""
    command = [sys.executable, "-m", "nanovllm"]
    return {
        **{name: [sys.executable, "-c", code.format(model=model)] for name, code in IN_PYTHON.items()},
        "nanovllm --version": [*command, "--version"],
        "nanovllm --help": [*command, "--help"],
        "nanovllm generate": [*command, "generate", "What is paged attention?", "--model", model, "--max-tokens", "16"],
    }


def measure(command: list[str]) -> tuple[float | None, float]:
    """Seconds until the first byte of output (None: there was none), and until the end."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
    assert process.stdout is not None
    first = time.perf_counter() - start if process.stdout.read(1) else None
    process.stdout.read()
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(command)} failed")
    return first, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--output", type=Path, default=RESULTS / "startup.json")
    options = parser.parse_args()

    todo = commands(options.model)
    times: dict[str, list[tuple[float | None, float]]] = {name: [] for name in todo}
    for _ in range(options.rounds + 1):  # in turn, so that a change of the machine's mood meets all alike
        for name, command in todo.items():
            times[name].append(measure(command))
    results = {}
    for name, measured in times.items():
        firsts = [first for first, _ in measured[1:] if first is not None]  # the first round warmed the page cache
        results[name] = {
            "first_token": statistics.median(firsts) if "generate" in name else None,
            "whole": statistics.median(whole for _, whole in measured[1:]),
            "rounds": measured,
        }
    print_table(
        ["seconds, medians", "first token", "whole"],
        [[name, "" if r["first_token"] is None else r["first_token"], r["whole"]] for name, r in results.items()],
    )
    write_results(options.output, model=options.model, seconds=results)


if __name__ == "__main__":
    main()
