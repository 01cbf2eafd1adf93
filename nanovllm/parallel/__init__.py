"""Where a rank stands among its peers, and the collectives the layers need."""

from __future__ import annotations

from nanovllm.parallel.context import ParallelContext

__all__ = ["ParallelContext"]
