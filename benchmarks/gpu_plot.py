"""A roofline plot of gpu_check.py's figures: what was reached, under what bandwidth and product rate allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_roofline(results: Path, figures: dict[str, Any]) -> None:
    """Write ``results`` with the suffix .png; nothing without matplotlib, or without limits."""
    limits = figures.get("measured_limits", {})
    phases = {
        "single stream": figures.get("single_stream", {}).get("ratio_to_limit"),
        "Nano-vLLM's benchmark": figures.get("nano_vllm_bench", {}).get("ratio_to_limit"),
        "prefill": figures.get("prefill", {}).get("ratio_to_products"),
    }
    for implementation, cases in figures.get("attention", {}).items():
        if isinstance(cases, dict) and implementation != "chosen":
            for name, case in cases.items():
                phases[f"attention {name} ({implementation})"] = case.get("of_copying", case.get("of_products"))
    for rows, case in figures.get("batch_sweep", {}).items():
        if isinstance(case, dict):
            phases[f"{rows} requests"] = case["ratio_to_limit"]
    reached = {name: share for name, share in phases.items() if share is not None}
    if not reached or "bytes_per_s" not in limits:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure = Figure(figsize=(8, 0.4 * len(reached) + 1.5), layout="constrained")
    axes = figure.subplots()
    names = list(reached)[::-1]
    bars = axes.barh(names, [100 * reached[name] for name in names], color="#4878a8")
    axes.bar_label(bars, fmt="%.0f %%", padding=3)
    axes.axvline(100, color="black", linewidth=1)
    axes.set_xlim(0, 115)
    axes.set_xlabel(
        f"% of what {limits['bytes_per_s'] / 1e12:.2f} TB/s of copying and "
        f"{limits['operations_per_s'] / 1e12:.0f} TFLOP/s of products allow"
    )
    target = results.with_suffix(".png")
    figure.savefig(target, dpi=150)
    print(f"written: {target}")
