"""Load a server of this machine, print the figures, and write them down.

    python -m tests.load                         # all scenarios, some minutes
    python -m tests.load hold --streams 1000
    python -m tests.load soak --seconds 600 --report benchmarks/results/load.json

- ``hold``      streams that are live at once, while the metrics are read
- ``overload``  requests at many times the rate that can be answered
- ``soak``      clients that leave, read slowly and send nonsense, steps that fail; memory, files and threads after it
- ``flood``     requests at the same moment
- ``kill``      the engine's process is killed while it answers

The engine is one without a model: a step takes a fixed time, and its tokens are known. ``--real`` puts the model in the
box behind ``hold``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # its own helpers

from load import scenarios
from load.engine import EngineSettings
from load.server import LoadServer
from nanovllm.entrypoints.cli.collect_env import summary
from nanovllm.entrypoints.serve.listener import raise_file_limit

NAMES = ("hold", "overload", "soak", "flood", "kill")


def hold(options: argparse.Namespace) -> dict[str, Any]:
    """Every stream has a row; a step takes so long that there are ``--streams`` tokens every half second."""
    if options.real:
        size = ("--max-num-seqs", str(options.streams), "--max-num-batched-tokens", str(max(2048, options.streams)))
        with LoadServer(*size, "--max-model-len", "512") as server:
            return scenarios.run(scenarios.hold(server, options.streams, options.tokens or 480, known=False))
    engine = EngineSettings(seconds=0.5, num_blocks=40 * options.streams, check=False)
    size = ("--max-num-seqs", str(options.streams), "--max-num-batched-tokens", str(max(16384, options.streams)))
    with LoadServer(*size, "--max-model-len", "512", engine=engine) as server:
        return scenarios.run(scenarios.hold(server, options.streams, options.tokens or 60))


def overload(options: argparse.Namespace) -> dict[str, Any]:
    """64 rows, 20 ms a step and 64 tokens a request: 50 requests a second. As many more may wait."""
    engine = EngineSettings(seconds=0.02, check=False)
    with LoadServer("--max-num-seqs", "64", "--max-num-queued-reqs", "128", engine=engine) as server:
        return scenarios.run(scenarios.overload(server, min(options.seconds, 60), options.factor, 64, 128))


def soak(options: argparse.Namespace) -> dict[str, Any]:
    engine = EngineSettings(seconds=0.005, num_blocks=600, fault_rate=0.01)
    with LoadServer("--max-num-seqs", "32", "--client-timeout", "5", engine=engine) as server:
        return scenarios.run(scenarios.soak(server, options.seconds, options.clients, options.seconds / 3))


def flood(options: argparse.Namespace) -> dict[str, Any]:
    engine = EngineSettings(seconds=0.005, check=False)
    with LoadServer("--max-num-seqs", "256", "--max-num-queued-reqs", "2000", engine=engine) as server:
        return scenarios.run(scenarios.flood(server, options.requests))


def kill(options: argparse.Namespace) -> dict[str, Any]:
    engine = EngineSettings(seconds=0.01)
    with LoadServer("--max-num-seqs", "64", engine=engine) as server:
        return scenarios.run(scenarios.kill(server, 200))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", nargs="*", choices=[*NAMES, []], metavar="SCENARIO", help="default: all")
    parser.add_argument("--streams", type=int, default=1000, help="of hold (default: 1000)")
    parser.add_argument("--tokens", type=int, help="of every stream of hold (default: 60; 480 with --real)")
    parser.add_argument("--seconds", type=float, default=180.0, help="of soak, and of overload up to 60 (default: 180)")
    parser.add_argument("--clients", type=int, default=64, help="of soak (default: 64)")
    parser.add_argument("--factor", type=float, default=10.0, help="of overload (default: 10)")
    parser.add_argument("--requests", type=int, default=10_000, help="of flood (default: 10000)")
    parser.add_argument("--real", action="store_true", help="hold streams of the model in the box")
    parser.add_argument("--report", type=Path, help="write the figures to this file, beside those already in it")
    options = parser.parse_args()
    raise_file_limit()
    for name in options.scenario or NAMES:
        figures = globals()[name](options)
        print(f"{name}: {json.dumps(_rounded(figures), indent=2)}", flush=True)
        if options.report is not None:
            _write(options.report, name + ("-real" if options.real and name == "hold" else ""), figures)
    return 0


def _write(file: Path, name: str, figures: dict[str, Any]) -> None:
    found = json.loads(file.read_text()) if file.exists() else {}
    about = {
        "command": " ".join(["python", "-m", "tests.load", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": summary(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }
    found[name] = {**about, **_rounded(figures)}
    file.write_text(json.dumps(found, indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
