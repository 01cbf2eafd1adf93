"""A program at a terminal: keys go in, what the screen is sent comes out."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence

TIMEOUT = 30.0  # seconds to wait for output; far more than is ever needed


class PseudoTerminal:
    """Runs a command with a terminal of its own as standard input and output.

    Args:
        command: program and arguments.
        env: its environment.
        stderr_too: standard error is the terminal as well; otherwise it is a pipe.

    Attributes:
        screen: all that was read from the terminal.
        errors: all that was read from standard error, if it is a pipe.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], stderr_too: bool = False) -> None:
        self._terminal, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 500, 0, 0))  # wide: no line is broken or scrolled
        self.screen = self.errors = b""
        self.process = subprocess.Popen(
            command,
            stdin=end,
            stdout=end,
            stderr=end if stderr_too else subprocess.PIPE,
            env={**env, "TERM": "dumb"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
        )
        os.close(end)

    def type(self, keys: str | bytes) -> None:
        os.write(self._terminal, keys.encode() if isinstance(keys, str) else keys)

    def wait_for_screen(self, part: str, since: int = 0) -> int:
        """Wait until the text is on the screen; returns where it ends. ``since`` is a position to look from."""
        while (at := self.screen.find(part.encode(), since)) < 0:
            self._read()
        return at + len(part.encode())

    def wait_for_error(self, part: str, since: int = 0) -> int:
        """The same for standard error."""
        while (at := self.errors.find(part.encode(), since)) < 0:
            self._read()
        return at + len(part.encode())

    def wait_for_more(self, num_bytes: int) -> None:
        """Wait until so much more is on the screen."""
        enough = len(self.screen) + num_bytes
        while len(self.screen) < enough:
            self._read()

    def wait(self) -> int:
        """Read everything up to the end of the program; its exit code."""
        while self._read(at_end=False):
            pass
        return self.process.wait(TIMEOUT)

    def _read(self, at_end: bool = True) -> bool:
        """Read what comes next; False, or with ``at_end`` an error, if nothing will."""
        files = [self._terminal] + ([self.process.stderr.fileno()] if self.process.stderr is not None else [])
        deadline = time.monotonic() + TIMEOUT
        while files and time.monotonic() < deadline:
            for file in select.select(files, [], [], 1.0)[0]:
                try:
                    data = os.read(file, 65536)
                except OSError:  # how Linux reports that the other end was closed
                    data = b""
                if not data:
                    files.remove(file)
                elif file == self._terminal:
                    self.screen += data
                    return True
                else:
                    self.errors += data
                    return True
        assert not at_end and not files, (self.screen[-500:], self.errors[-500:])
        return False

    def __enter__(self) -> PseudoTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()
        os.close(self._terminal)
