"""A core in a process of its own, seen from inside: the model is loaded and run here, torch lives here.

The parent holds the other end of a socket. When that end closes, however the parent ended, this process ends too.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import select
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from nanovllm.config import EngineConfig
from nanovllm.engine.channel import Channel, ChannelClosed
from nanovllm.engine.core import EngineCore
from nanovllm.engine.engine_loop import EngineLoop
from nanovllm.engine.face import make_core
from nanovllm.engine.garbage import collect_rarely
from nanovllm.engine.messages import Command, Died, Message, Ready
from nanovllm.engine.plain import from_plain
from nanovllm.engine.wire import decode_command, encode_message
from nanovllm.errors import ModelError, ParameterError

logger = logging.getLogger(__name__)

MakeCore = Callable[[EngineConfig], tuple[EngineConfig, EngineCore]]

MOST_BACKLOG = 64 << 20  # bytes; a front that has left more than this unread is waited for
GRACE = 1.0  # seconds that the core has to end by itself once its parent has gone
LAST_WORDS = 1.0  # seconds that the parent has to take the reason of a fault


class ChannelInbox:
    """An `Inbox` at the end of a channel, and the way back."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._frames: list[bytes] = []  # received, not yet taken
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel, selectors.EVENT_READ)

    def first_frame(self) -> bytes:
        """Wait for the frame that comes before all commands."""
        while not self._frames:
            self._selector.select()
            self._frames = self._channel.receive()
        return self._frames.pop(0)

    def take(self, wait: bool) -> list[Command] | None:
        """The commands that have arrived; None when the parent wants no more."""
        channel = self._channel
        try:
            if channel.backlog:
                channel.flush()
            while True:
                frames, self._frames = self._frames + channel.receive(), []
                commands = [decode_command(frame) for frame in frames]
                if commands or not (wait or channel.backlog > MOST_BACKLOG):
                    return commands
                self._sleep()
        except ChannelClosed:
            return None

    def deliver(self, message: Message) -> None:
        """Send a message. Raises ChannelClosed if the parent has gone."""
        self._channel.send(encode_message(message))

    def flush(self, seconds: float) -> None:
        """Wait until all was sent, but not for longer than that."""
        end = time.monotonic() + seconds
        self._selector.modify(self._channel, selectors.EVENT_WRITE)
        with suppress(ChannelClosed):
            while self._channel.backlog and time.monotonic() < end:
                self._selector.select(0.1)
                self._channel.flush()

    def _sleep(self) -> None:
        """Until a command comes, or the parent takes more of what is unsent."""
        writing = selectors.EVENT_WRITE if self._channel.backlog else 0
        self._selector.modify(self._channel, selectors.EVENT_READ | writing)
        self._selector.select()
        if writing:
            self._channel.flush()


def run(connection: socket.socket, make_core: MakeCore) -> int:
    """Be an engine for whoever holds the other end.

    Args:
        connection: its first frame is that of `spawn`.
        make_core: loads the model.

    Returns:
        The exit code: 0 when the other side has closed, 1 after a fault, which it has been told.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # to the whole group; the parent ends its work first, and then us
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(connection.fileno(),), daemon=True).start()
    inbox = ChannelInbox(Channel(connection))
    try:
        first = json.loads(inbox.first_frame())
        _setup_logging(first["log_level"])
        config, core = _load(make_core, from_plain(EngineConfig, first["config"]))
        max_model_len = config.model.max_model_len
        inbox.deliver(Ready(max_model_len, core.executor.num_blocks))
        EngineLoop(core, max_model_len, inbox, inbox.deliver).run()
        core.shutdown()
        return 0
    except ChannelClosed:
        return 0
    except BaseException as error:
        if not isinstance(error, ParameterError | ModelError):
            logger.exception("The engine has stopped.")
        with suppress(ChannelClosed):
            inbox.deliver(Died(error))
            inbox.flush(LAST_WORDS)
        return 1


def main() -> None:
    """Run on the socket whose number is the first argument."""
    code = run(socket.socket(fileno=int(sys.argv[1])), make_core)
    logging.shutdown()
    os._exit(code)  # there is nothing to put in order, and taking torch apart would take half a second


def _load(make_core: MakeCore, config: EngineConfig) -> tuple[EngineConfig, EngineCore]:
    """Load the model. What torch brings along lives as long as the process: no garbage is looked for in it, ever."""
    gc.disable()
    made = make_core(config)
    gc.freeze()
    gc.enable()
    collect_rarely()
    return made


def _setup_logging(level: str) -> None:
    from nanovllm.entrypoints.log import setup_logging

    setup_logging(level)


def _end_with_parent(fd: int) -> None:
    """Sleep until the other end is closed, then end this process, even in the middle of loading or of a step.

    Not left to PR_SET_PDEATHSIG: that strikes when the *thread* that started us ends, and exists on Linux only.
    """
    watch = select.poll()
    watch.register(fd, 0)  # hang-up is always reported
    watch.poll()
    time.sleep(GRACE)
    os._exit(1)
