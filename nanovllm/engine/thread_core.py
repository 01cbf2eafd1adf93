"""A core on a thread of this process."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from nanovllm.engine.core import EngineCore
from nanovllm.engine.engine_loop import EngineLoop
from nanovllm.engine.messages import Command, Died, Message

logger = logging.getLogger(__name__)

Listener = Callable[[Message], None]


class ThreadCore:
    """Runs an `EngineLoop`; both its inbox and the hand that commands it.

    Attributes:
        core: what runs. Only its own thread may touch it while it has work.
        error: why it has stopped by itself, if it has.
    """

    def __init__(self, core: EngineCore, max_model_len: int) -> None:
        self.core = core
        self.error: BaseException | None = None
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._listener: tuple[asyncio.AbstractEventLoop, Listener] | None = None
        self._max_model_len = max_model_len
        self._thread = threading.Thread(target=self._run, name="nanovllm-core", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether commands are still obeyed."""
        return self._thread.is_alive()

    def listen(self, loop: asyncio.AbstractEventLoop, listener: Listener) -> None:
        """Deliver all messages from now on by calling ``listener`` on ``loop``."""
        self._listener = loop, listener

    def send(self, command: Command) -> None:
        """Have a command obeyed before the next step."""
        self._commands.put(command)

    def stop(self) -> None:
        """Wait for the step under way, then free weights and cache. Idempotent."""
        self._commands.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self.core.shutdown()

    def take(self, wait: bool) -> list[Command] | None:
        """The commands that have arrived (see `Inbox`)."""
        commands: list[Command] = []
        with suppress(Empty):
            while True:
                command = self._commands.get(block=wait and not commands)
                if command is None:
                    return None
                commands.append(command)
        return commands

    def _deliver(self, message: Message) -> None:
        if self._listener is not None:
            loop, listener = self._listener
            with suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
                loop.call_soon_threadsafe(listener, message)

    def _run(self) -> None:
        try:
            EngineLoop(self.core, self._max_model_len, self, self._deliver).run()
        except BaseException as error:
            logger.exception("The engine has stopped.")
            self.error = error
            self._deliver(Died(error))
