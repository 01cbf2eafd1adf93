"""All that is to be known of an Ascend NPU, in one command: is it right, and how fast is it?

    python benchmarks/npu_check.py                                  # on an NPU
    python benchmarks/npu_check.py --only doctor operators tokens   # some of it
    python benchmarks/npu_check.py --device cpu --quick             # a rehearsal: only to see that the command works

First the checks: what nanovllm doctor finds; every operator against the reference; greedy tokens of the model in the
box against the CPU; graphs against single launches, token for token; prefix cache, chunks of prompts, preemption;
collectives between the NPUs, if there are several. Then the figures, on Qwen3-0.6B's shape with random weights:
Nano-vLLM's benchmark, one stream, prompts, batches, time to start. One JSON file holds everything: attach it to a
report. What fails is noted with its reason, and the rest goes on; the exit code is 1 if a check failed.

On a 310P float16 and eager mode are chosen by themselves. The network is not used.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import tempfile
from pathlib import Path

from gpu_engine import Setup
from gpu_speed import FIGURES
from npu_correctness import CHECKS
from parts import run, verdict
from report import RESULTS, write_results
from workloads import QWEN3_0_6B, TINY

from nanovllm.platforms import NpuPlatform, get_platform

OURS = {name: FIGURES[name] for name in ("measured_limits", "nano_vllm_bench", "single_stream", "prefill",
                                         "batch_sweep", "start")}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("npu", "cpu"), default="npu")
    parser.add_argument("--quick", action="store_true", help="a tiny model and little work: the figures mean nothing")
    parser.add_argument("--only", nargs="+", choices=(*CHECKS, *OURS), help="these parts alone")
    parser.add_argument("--output", metavar="FILE", type=Path)
    args = parser.parse_args()
    platform = get_platform(args.device)
    if isinstance(platform, NpuPlatform):
        platform.load()
    with tempfile.TemporaryDirectory() as folder:
        shape = TINY if args.quick else QWEN3_0_6B
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        setup = Setup(args.device, args.quick, shape, Path(folder), None, None)
        checks = run("check", CHECKS, setup, args.only)
        figures = run("figure", OURS, setup, args.only)
    name = setup.device_name()
    today = datetime.date.today().isoformat()
    output = args.output or RESULTS / f"npu-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}-{today}.json"
    write_results(output, device=name, quick=args.quick, checks=checks, **figures)
    return verdict(checks)


if __name__ == "__main__":
    sys.exit(main())
