"""A core in a process of its own, seen from outside: talks to it, and tells how it ended. No torch."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress

from nanovllm.engine.channel import ChannelClosed
from nanovllm.engine.messages import Command, Died, Message, Ready
from nanovllm.engine.spawn import EngineProcess
from nanovllm.engine.wire import decode_message, encode_command
from nanovllm.errors import EngineDeadError, ModelError, ParameterError

logger = logging.getLogger(__name__)

Listener = Callable[[Message], None]

PATIENCE = 2.0  # seconds a process has to end by itself


class ChildCore:
    """An engine process and this end of the channel to it.

    Attributes:
        pid: the process's id.
        error: why it has stopped by itself, if it has.
    """

    def __init__(self, started: EngineProcess) -> None:
        """A `Ready` tells when its model is loaded, a `Died` that it cannot be."""
        self.error: BaseException | None = None
        self._started = started
        self._process, self._channel = started.process, started.channel
        self._ready = False
        self._last_words: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener: Listener | None = None
        self._stopped = False

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether commands are still obeyed."""
        return not self._stopped and self.error is None and self._process.poll() is None

    def again(self) -> ChildCore:
        """Another process like this one. Raises OSError if there can be none."""
        return ChildCore(self._started.again())

    def listen(self, loop: asyncio.AbstractEventLoop, listener: Listener) -> None:
        """Deliver all messages from now on by calling ``listener`` on ``loop``."""
        self._unhook()
        self._loop, self._listener = loop, listener
        if self.error is not None:
            loop.call_soon(listener, Died(self.error))
        elif not self._stopped:
            loop.add_reader(self._channel.fileno(), self._read)
            self._write_later()

    def send(self, command: Command) -> None:
        """Have a command obeyed before the next step."""
        if self.error is None and not self._stopped:
            with suppress(ChannelClosed):  # what it said last is still to be read; the reader tells of its end
                self._channel.send(encode_command(command))
            self._write_later()

    def stop(self) -> None:
        """End the process; kill it if it does not end soon. Idempotent; any thread may call this."""
        if self._stopped:
            return
        self._stopped = True
        self._on_loop(self._unhook)
        self._channel.end()
        self._bury()
        self._channel.close()

    # -- on the event loop ---------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            for frame in self._channel.receive():
                message = decode_message(frame)
                if isinstance(message, Died):
                    self._last_words = message.error  # its end is near
                    continue
                self._ready = self._ready or isinstance(message, Ready)
                if self._listener is not None:
                    self._listener(message)
        except ChannelClosed:
            self._die()
        except ValueError as error:
            self._last_words = error
            self._process.kill()
            self._die()

    def _die(self) -> None:
        """The process has ended, or is not to be trusted any more."""
        self._unhook()
        self._channel.close()
        code = self._bury()
        words = self._last_words
        if not self._ready and isinstance(words, (ParameterError, ModelError)):
            self.error = words
        else:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            while_what = "" if self._ready else " while it was loading"
            self.error = EngineDeadError(f"the engine process {how}{while_what}" + (f": {words}" if words else ""))
        if self._listener is not None:
            self._listener(Died(self.error))

    def _write_later(self) -> None:
        if self._channel.backlog and self._loop is not None:
            self._loop.add_writer(self._channel.fileno(), self._write)

    def _write(self) -> None:
        with suppress(ChannelClosed):
            self._channel.flush()
            if self._channel.backlog:
                return
        if self._loop is not None:
            self._loop.remove_writer(self._channel.fileno())

    def _unhook(self) -> None:
        fd = self._channel.fileno()
        if self._loop is not None and not self._loop.is_closed() and fd >= 0:
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)

    # -- from any thread -----------------------------------------------------------------------------------------

    def _on_loop(self, action: Callable[[], None]) -> None:
        """Do something where no callback of ours is running: on the loop, if it runs in another thread."""
        loop = self._loop
        try:
            here = asyncio.get_running_loop() is loop
        except RuntimeError:
            here = loop is None or not loop.is_running()
        if here or loop is None:
            action()
            return
        done = threading.Event()

        def act() -> None:
            action()
            done.set()

        with suppress(RuntimeError):  # closed meanwhile
            loop.call_soon_threadsafe(act)
            done.wait(PATIENCE)

    def _bury(self) -> int:
        """Wait for the process's end; its exit code, negative for a signal."""
        try:
            return self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            logger.warning("The engine process %d does not end by itself: killed.", self.pid)
            self._process.kill()
            return self._process.wait()
