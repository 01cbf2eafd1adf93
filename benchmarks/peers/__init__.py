"""One small program per engine, run by cpu_peers.py in a process of its own, with the engine's own Python.

``python -m peers.NAME MODEL FORMAT --scale S --workloads W ...`` prints a line of JSON: seconds until the engine was
ready, imports included, and seconds by workload.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

from workloads import Workload, time_workloads, workloads

_STARTED = time.perf_counter()

Generate = Callable[[Workload], None]


def measure(load: Callable[[str, str], Generate]) -> None:
    """Load an engine, ``load(model, format)``, and time the workloads the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("format")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--workloads", nargs="+", default=list(workloads()))
    options = parser.parse_args()
    generate = load(options.model, options.format)
    seconds = {"ready": time.perf_counter() - _STARTED}
    works = {name: work for name, work in workloads(options.scale).items() if name in options.workloads}
    print(json.dumps(seconds | time_workloads(generate, works)), flush=True)
