"""All that is to be known of a GPU, in one command of less than ten minutes: is it right, and how fast is it?

    python benchmarks/gpu_check.py                              # on an NVIDIA GPU
    python benchmarks/gpu_check.py --nano-vllm ../nano-vllm     # and Nano-vLLM beside us, from a checkout of it
    python benchmarks/gpu_check.py --device cpu --quick         # a rehearsal: only to see that the command works

First the checks (operators against the reference, parity with transformers, graphs against single launches, number
formats, prefix cache, preemption, abort, waiting where nothing may wait), then the figures, on Qwen3-0.6B's shape with
random weights, beside what the measured bandwidth and product rate of the card allow. One JSON file holds everything,
written after each part, and where matplotlib is installed a roofline plot stands beside it. Every part has a process
and a limit of time of its own: what fails, hangs or crashes is noted with its reason, and the rest goes on. The exit
code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import gpu_correctness
import gpu_formats
import gpu_speed
import gpu_trace
from gpu_engine import Setup
from gpu_plot import plot_roofline
from isolated import Isolated, Part, PartError
from parts import run, verdict
from report import RESULTS, save_results, write_results
from workloads import QWEN3_0_6B, TINY

CHECKS: dict[str, Part] = {
    **gpu_correctness.CHECKS,
    "formats": gpu_formats.formats,
    "trace": gpu_trace.trace,
}
FIGURES: dict[str, Part] = {
    **gpu_speed.FIGURES,
    "recording": gpu_trace.recording,
    "quantised": gpu_formats.quantised,
    "nano_vllm": gpu_speed.nano_vllm,
}
SECONDS = {  # that a part may take on a GPU
    "device": 60, "operators": 170, "parity": 50, "attention_backends": 60, "graphs": 45, "prefix_cache": 30,
    "preemption": 40, "out_of_memory": 30, "abort": 25, "neighbour": 40, "waiting": 40, "formats": 75, "trace": 30,
    "measured_limits": 20, "attention": 45, "start": 45, "nano_vllm_bench": 45, "single_stream": 25, "prefill": 25,
    "batch_sweep": 60, "recording": 30, "quantised": 75, "nano_vllm": 150,
}  # fmt: skip
CHECKS_SHARE = 0.62  # of all the time; the figures have what is left

# What is to be reached on an H200: where it stands in the file, and at least (or at most) how much.
GOALS = [
    ("nano_vllm_bench.output_tokens_per_s", ">=", 27_000),
    ("nano_vllm_bench.ratio_to_limit", ">=", 0.75),
    ("nano_vllm_bench.ratio_to_nano_vllm", ">=", 1.3),
    ("single_stream.ratio_to_limit", ">=", 0.6),
    ("prefill.ratio_to_products", ">=", 0.6),
    ("attention.triton.256 x 1k.of_copying", ">=", 0.8),
    ("start.second.first_token_s", "<=", 6.0),
    ("recording.seconds", "<=", 5.0),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model and little work: the figures mean nothing")
    parser.add_argument("--only", nargs="+", choices=(*CHECKS, *FIGURES), metavar="PART", help="these parts alone")
    parser.add_argument("--nano-vllm", metavar="FOLDER", type=Path, help="a checkout of Nano-vLLM, to run beside us")
    parser.add_argument("--attention-backend", metavar="NAME", help="instead of the device's own")
    parser.add_argument("--seconds", type=float, default=560.0, help="for everything (default: %(default)s)")
    parser.add_argument("--output", metavar="FILE", type=Path)
    args = parser.parse_args()
    slow = 1 if args.device == "cuda" else 20  # nobody waits for a rehearsal, and its machine may be busy
    limits, total = {name: slow * seconds for name, seconds in SECONDS.items()}, slow * args.seconds
    with tempfile.TemporaryDirectory() as folder:
        shape = TINY if args.quick else QWEN3_0_6B
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        setup = Setup(args.device, args.quick, shape, Path(folder), args.nano_vllm, args.attention_backend)
        try:
            device = Isolated(limits, total)("device", _device, setup)["name"]
        except PartError as error:
            parser.exit(1, f"no {args.device} to check: {error}\n")
        results: dict[str, Any] = {"device": device, "quick": args.quick, "checks": {}}
        output = args.output or _file(device)

        def note(new: dict[str, Any]) -> None:
            results.update(new)
            rates = results.get("measured_limits", {})
            setup.limits = {name: rates[name] for name in ("bytes_per_s", "operations_per_s") if name in rates}
            _compare(results)
            save_results(output, results)

        everything, checks = Isolated(limits, total), Isolated(limits, CHECKS_SHARE * total)  # from here on
        run("check", CHECKS, setup, args.only, checks, lambda found: note({"checks": found}))
        run("figure", FIGURES, setup, args.only, everything, note)
    if not args.quick:
        results["goals"] = goals(results)
    write_results(output, **results)
    plot_roofline(output, results)
    return verdict(results["checks"])


def _compare(results: dict[str, Any]) -> None:
    """Put Nano-vLLM's time beside ours, where both ran."""
    ours, theirs = results.get("nano_vllm_bench", {}), results.get("nano_vllm", {})
    if "output_tokens_per_s" in ours and "output_tokens_per_s" in theirs:
        ours["ratio_to_nano_vllm"] = ours["output_tokens_per_s"] / theirs["output_tokens_per_s"]


def goals(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was reached of ``GOALS``; None where it was not measured."""
    found: dict[str, dict[str, Any]] = {}
    for place, sign, goal in GOALS:
        value: Any = results
        for name in place.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        met = None if value is None else (value >= goal if sign == ">=" else value <= goal)
        found[place] = {"goal": f"{sign} {goal:g}", "reached": value, "met": met}
    return found


def _device(setup: Setup) -> dict[str, str]:
    return {"name": setup.device_name()}


def _file(device: str) -> Path:
    today = datetime.date.today().isoformat()
    return RESULTS / f"gpu-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}-{today}.json"


if __name__ == "__main__":
    sys.exit(main())
