"""Commands made of parts (checks and figures): what fails is noted with its reason, and the rest goes on."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

from gpu_engine import Setup
from isolated import Part, PartError


def _here(name: str, part: Part, setup: Setup) -> dict[str, Any]:
    return part(setup)


def run(
    kind: str,
    parts: dict[str, Part],
    setup: Setup,
    only: list[str] | None,
    call: Callable[[str, Part, Setup], dict[str, Any]] = _here,
    done: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Run the parts in order; one that raises is noted and the next begins.

    Args:
        call: runs a part: in this process, or by `Isolated`.
        done: told all results so far, after each part.
    """
    results: dict[str, Any] = {}
    for name, part in parts.items():
        if only and name not in only:
            continue
        started = time.perf_counter()
        print(f"{kind}: {name} ...", end=" ", flush=True)
        try:
            results[name] = call(name, part, setup)
            outcome = "done"
            if kind == "check":
                results[name] = {"passed": True, **results[name]}
                outcome = "passed" if results[name]["passed"] else "FAILED"
        except Exception as error:
            if isinstance(error, PartError):  # its own process has shown where
                results[name] = {"error": str(error)}
            else:
                traceback.print_exc()
                results[name] = {"error": f"{type(error).__name__}: {error}"}
            outcome = "FAILED"
            if kind == "check":
                results[name]["passed"] = False
        results[name]["seconds"] = round(time.perf_counter() - started, 2)
        print(f"{outcome} ({results[name]['seconds']:.1f} s) {summary(results[name])}", flush=True)
        done(results)
    return results


def summary(result: dict[str, Any]) -> str:
    """The numbers of a part, on one line."""
    return ", ".join(f"{key} {value:.4g}" for key, value in result.items() if type(value) is float and key != "seconds")


def verdict(checks: dict[str, Any]) -> int:
    """Print which checks failed; the exit code: 1 if one did."""
    failed = [name for name, result in checks.items() if not result["passed"]]
    print(f"checks failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0
