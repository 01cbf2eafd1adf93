"""Where the messages of a chat come from: lines typed at a terminal, or the lines of a pipe or file."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from nanovllm.entrypoints.cli.parser import UsageError
from nanovllm.entrypoints.cli.prompts import valid_text

HISTORY_LEN = 1000  # lines kept between programs
_CTRL_C_TO_END = 3  # presses during one answer, should a step not return


def is_typed() -> bool:
    """Whether somebody types: standard input is a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def typed_lines(prompt: str) -> Generator[str, None, None]:
    """Lines typed at the terminal until Ctrl-D, with line editing and a history where readline is there.

    Ctrl-C throws the line away, as in a shell. A line that is not UTF-8 is answered, and not handed out.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):  # undecodable bytes arrive as lone surrogates: not the end of the chat
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    with _line_editing():
        while True:
            try:
                line = _read_line(prompt)
                yield valid_text(line, "the message")
            except KeyboardInterrupt:
                say("\n(Ctrl-D or /exit ends the program)")
            except EOFError:
                say("")  # the shell's prompt gets a line of its own
                return
            except UsageError as error:
                say(f"{error}; it was not sent")


def piped_lines() -> Iterator[str]:
    """The lines of standard input, each as soon as it is there.

    Raises:
        UsageError: standard input is closed, or a line is not UTF-8.
    """
    if sys.stdin is None:
        raise UsageError("standard input is closed")
    for number, data in enumerate(sys.stdin.buffer, start=1):
        try:
            yield data.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"line {number} of standard input is not UTF-8 text: byte 0x{data[error.start]:02x} at position "
                f"{error.start}; convert it first"
            ) from None


def say(text: str) -> None:
    """A word of the program's own, which is not part of its output."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def interrupts_noted() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted instead of raised: it must not strike in the middle of a step of the engine.

    Yields:
        A function that tells whether Ctrl-C was pressed.
    """
    presses = 0

    def note(*_: object) -> None:
        nonlocal presses
        presses += 1
        if presses >= _CTRL_C_TO_END:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, previous)


def _read_line(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)  # standard output is for the answers
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def _history_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "nanovllm" / "chat_history"


@contextmanager
def _line_editing() -> Iterator[None]:
    """Line editing, and the history of earlier programs. Nothing depends on either."""
    try:
        import readline
    except ImportError:
        yield
        return
    try:
        file = _history_file()
    except RuntimeError:  # there is no home directory
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(HISTORY_LEN)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            readline.write_history_file(file)
