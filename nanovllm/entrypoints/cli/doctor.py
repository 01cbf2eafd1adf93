"""``nanovllm doctor``: what keeps the engine from running here, or from running well, and what to do about it.

Nothing that could be broken is loaded into this process: torch and device libraries are asked in others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict

from nanovllm.entrypoints.doctor import probes
from nanovllm.entrypoints.doctor.findings import Finding

DEVICES = ("auto", "cpu", "cuda", "npu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.epilog = "The exit code is 1 if there is a problem. nanovllm collect-env is the report for an issue."
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="the device to be used: that it is not there is a problem",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found, problems with their remedies; 1 if there is a problem."""
    found = []
    for finding in examine(arguments.device):
        found.append(finding)
        if not arguments.json:
            _print(finding)
    problems, warnings = (sum(finding.level == level for finding in found) for level in ("problem", "warning"))
    if arguments.json:
        counts = {"problems": problems, "warnings": warnings}
        print(json.dumps({"findings": [asdict(finding) for finding in found], **counts}, indent=2, ensure_ascii=False))
    else:
        print(f"\n{problems} problem(s), {warnings} warning(s)")
    return 1 if problems else 0


def examine(device: str = "auto") -> Iterator[Finding]:
    """Everything that is found, as it is found. ``device``: "cpu" leaves accelerators out."""
    from nanovllm.entrypoints.doctor import gpu, host, npu

    yield from host.check_python()
    torch = probes.ask(probes.TORCH)
    yield from host.check_torch(torch)
    yield from host.check_memory()
    yield from host.check_kernels()
    if device in ("auto", "cuda"):
        yield from gpu.check_gpu(device == "cuda", torch.value)
    if device in ("auto", "npu"):
        yield from npu.check_npu(device == "npu", None if torch.value is None else str(torch.value["version"]))


def _print(finding: Finding) -> None:
    print(f"{finding.level:<8} {finding.subject:<17} {finding.what}", flush=True)
    if finding.remedy:
        print(f"{'':<26} -> {finding.remedy}", flush=True)
