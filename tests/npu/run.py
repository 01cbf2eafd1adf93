"""Run a program on the emulated Ascend: ``python -m tests.npu.run script.py [arguments]`` (or ``-m module ...``).

``--soc=Ascend310P3``, ``--lazy=1`` and the other settings of README.md come before the program.
"""

from __future__ import annotations

import os
import sys

from .emulator.environment import variables, why_not


def main() -> None:
    """Replace this process by the program, in the environment of the emulation."""
    arguments, settings = sys.argv[1:], {}
    while arguments and arguments[0].startswith("--") and "=" in arguments[0]:
        name, value = arguments.pop(0)[2:].split("=", 1)
        settings[name] = value
    if not arguments:
        sys.exit(__doc__)
    if reason := why_not():
        sys.exit(reason)
    os.execve(sys.executable, [sys.executable, *arguments], variables(**settings))


if __name__ == "__main__":
    main()
