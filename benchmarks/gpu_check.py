"""All that is to be known of a GPU, in one command of less than ten minutes: is it right, and how fast is it?

    python benchmarks/gpu_check.py                              # on an NVIDIA GPU
    python benchmarks/gpu_check.py --nano-vllm ../nano-vllm     # and Nano-vLLM beside us, from a checkout of it
    python benchmarks/gpu_check.py --device cpu --quick         # only to see that the command works

First the checks (operators against the reference, parity with transformers, graphs against single launches, prefix
cache, preemption, abort, waiting where nothing may wait), then the figures, on Qwen3-0.6B's shape with random weights,
beside what the measured bandwidth and product rate of the card allow. One JSON file holds everything, and where
matplotlib is installed a roofline plot stands beside it. What fails is noted with its reason, and the rest goes on; the
exit code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import tempfile
from pathlib import Path

from gpu_correctness import CHECKS
from gpu_engine import Setup
from gpu_plot import plot_roofline
from gpu_speed import FIGURES
from parts import run, verdict
from report import RESULTS, write_results
from workloads import QWEN3_0_6B, TINY


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model and little work: the figures mean nothing")
    parser.add_argument("--only", nargs="+", choices=(*CHECKS, *FIGURES), help="these parts alone")
    parser.add_argument("--nano-vllm", metavar="FOLDER", type=Path, help="a checkout of Nano-vLLM, to run beside us")
    parser.add_argument("--attention-backend", metavar="NAME", help="instead of the device's own")
    parser.add_argument("--output", metavar="FILE", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shape = TINY if args.quick else QWEN3_0_6B
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        setup = Setup(args.device, args.quick, shape, Path(folder), args.nano_vllm, args.attention_backend)
        checks = run("check", CHECKS, setup, args.only)
        figures = run("figure", FIGURES, setup, args.only)
    name = setup.device_name()
    today = datetime.date.today().isoformat()
    output = args.output or RESULTS / f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}-{today}.json"
    write_results(output, device=name, quick=args.quick, checks=checks, **figures)
    plot_roofline(output, figures)
    return verdict(checks)


if __name__ == "__main__":
    sys.exit(main())
