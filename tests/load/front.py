"""``nanovllm serve`` with the engine of `engine.py`: everything else is the server as users start it."""

from __future__ import annotations

import sys

import nanovllm.engine.spawn as spawning
from nanovllm.entrypoints.cli.main import main

if __name__ == "__main__":
    spawn = spawning.spawn
    spawning.spawn = lambda config, main="": spawn(config, "load.engine:main")
    sys.exit(main(["serve", *sys.argv[1:]]))
