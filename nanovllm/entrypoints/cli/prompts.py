"""Where prompts come from on the command line: an argument, a file, or standard input."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from nanovllm.entrypoints.cli.parser import UsageError


def read_prompts(prompt: str | None, file: str | None) -> list[str]:
    """The prompts asked for.

    Args:
        prompt: the text itself; ``"-"``, or None with standard input redirected, means all of standard input.
        file: a file with one prompt per line (blank lines are skipped); ``"-"`` means standard input.

    Raises:
        UsageError: no prompt, two sources, a file that cannot be read, or text that is not UTF-8.
    """
    if prompt is not None and file is not None:
        raise UsageError("give a prompt or --file, not both")
    if file is not None:
        lines = re.split("\r?\n", _read(file))  # str.splitlines would also split at U+2028 and its like
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise UsageError(f"--file {file}: there is no prompt in it; it holds one per line")
        return prompts
    if prompt is None and (sys.stdin is None or sys.stdin.isatty()):  # None: closed
        raise UsageError('give a prompt: nanovllm generate "...", --file FILE, or through a pipe')
    if prompt is None or prompt == "-":
        prompt = _read("-").rstrip("\r\n")
        if not prompt:
            raise UsageError("standard input is empty: no prompt")
    return [valid_text(prompt, "the prompt")]


def _read(file: str) -> str:
    name = "standard input" if file == "-" else file
    if file == "-" and sys.stdin is None:
        raise UsageError("standard input is closed")
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"--file {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not UTF-8 text: byte 0x{data[error.start]:02x} at position {error.start}; convert it first"
        ) from None


def valid_text(text: str, name: str) -> str:
    """The text itself.

    An argument, or a line typed, arrives with its undecodable bytes as lone surrogates, which no tokenizer takes.

    Raises:
        UsageError: such a text; ``name`` says which.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name} is not UTF-8 text (position {error.start})") from None
    return text
