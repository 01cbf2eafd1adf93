"""How often Python looks for cyclic garbage."""

from __future__ import annotations

import gc

_YOUNG_OBJECTS = 50_000


def collect_rarely() -> None:
    """Let a step finish before Python looks for garbage.

    A step of 1,024 streaming requests makes some ten thousand objects, alive until it ends and none of them in a cycle.
    At Python's own threshold (700, or 2,000) that sets off several collections a step, and each old generation they
    reach costs milliseconds. The setting is the process's; a higher one, or a collector switched off, is left alone.
    """
    young, middle, old = gc.get_threshold()
    if 0 < young < _YOUNG_OBJECTS:
        gc.set_threshold(_YOUNG_OBJECTS, middle, old)
