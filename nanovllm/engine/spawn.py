"""Starting the engine's process. Imports next to nothing, so that the process can load the model while its parent
imports everything else."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
from dataclasses import dataclass

from nanovllm.config import EngineConfig
from nanovllm.engine.channel import Channel
from nanovllm.engine.plain import to_plain

MAIN = "nanovllm.engine.core_process:main"


@dataclass(frozen=True)
class EngineProcess:
    """A process that was started, and our end of the channel to it.

    Attributes:
        config: what it was given.
        main: module and function that run in it.
    """

    config: EngineConfig
    main: str
    process: subprocess.Popen[bytes]
    channel: Channel

    def again(self) -> EngineProcess:
        """Start another one like it."""
        return spawn(self.config, self.main)


def spawn(config: EngineConfig, main: str = MAIN) -> EngineProcess:
    """Start a process that loads the model and then obeys commands; see `ChildCore`.

    Raises:
        OSError: there can be no further process.
    """
    ours, theirs = socket.socketpair()
    module, function = main.split(":")
    # The module path is ours, and nothing of the current folder can get before it. A session of its own keeps the
    # terminal's Ctrl-C away: this process ends its work first.
    code = f"import sys; sys.path[:] = sys.argv[2:]; from {module} import {function} as main; main()"
    command = [sys.executable, "-c", code, str(theirs.fileno()), *sys.path]
    with theirs:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
        )
    channel = Channel(ours)
    channel.send(_opening(config))
    return EngineProcess(config, main, process, channel)


def _opening(config: EngineConfig) -> bytes:
    """The first frame an engine process gets."""
    level = logging.getLevelName(logging.getLogger("nanovllm").getEffectiveLevel())
    return json.dumps({"config": to_plain(config), "log_level": level}).encode()
