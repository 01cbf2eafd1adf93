"""What all benchmarks share: a results file that says where and when it was measured, and a table."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanovllm.entrypoints.cli.collect_env import summary

RESULTS = Path(__file__).parent / "results"


def write_results(path: Path, **results: Any) -> None:
    """Write ``results`` as JSON, with the machine, the versions, the date and the command that measured them."""
    save_results(path, results)
    print(f"written: {path}")


def save_results(path: Path, results: dict[str, Any]) -> None:
    """As ``write_results``, in silence: for results that are not complete yet. The file is replaced as a whole."""
    about = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": summary(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(about | results, indent=1) + "\n")
    new.replace(path)


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print right-aligned columns; floats with three significant digits."""
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _cell(value: Any) -> str:
    if isinstance(value, float) and abs(value) < 100:
        return f"{value:.3g}"
    return f"{value:,.0f}" if isinstance(value, (int, float)) else str(value)
