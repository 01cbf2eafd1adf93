"""Text that arrives in pieces, for parsers that read as if all of it were there.

A parser is a generator. Wherever it needs text that has not arrived it yields, and it is resumed when there is more; so
it can be written from top to bottom, as a description of the format, and what it finds cannot depend on where the text
was cut. The methods below that may have to wait are generators too: call them with ``yield from``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeAlias, TypeVar

Result = TypeVar("Result")
Steps: TypeAlias = Generator[None, None, Result]


class Malformed(Exception):
    """The text at the source's position is not what the format has there."""


class Unfinished(Exception):
    """The text ended in the middle of something."""


class Source:
    """The text of one answer, as far as it has arrived.

    Attributes:
        position: how many characters have been read.
        closed: no more text will arrive.
    """

    def __init__(self) -> None:
        self._text = ""
        self._offset = 0  # position of the first character of _text
        self._marks = 0
        self.position = 0
        self.closed = False

    def push(self, text: str) -> None:
        """Append what has arrived."""
        if self._marks == 0:
            self._text = self._text[self.position - self._offset :]
            self._offset = self.position
        self._text += text

    def mark(self) -> int:
        """Keep the text from here on for `since`, until `release`. Returns the position."""
        self._marks += 1
        return self.position

    def release(self) -> None:
        """Undo one `mark`."""
        self._marks -= 1

    def since(self, position: int) -> str:
        """The text read since a marked position."""
        return self._text[position - self._offset : self.position - self._offset]

    @property
    def pending(self) -> str:
        """What has arrived and has not been read."""
        return self._text[self.position - self._offset :]

    def skip(self, count: int) -> None:
        """Read ``count`` characters that have arrived."""
        self.position += count

    def peek(self) -> Steps[str]:
        """The next character, not read yet. Raises `Unfinished` at the end."""
        while self.position - self._offset == len(self._text):
            if self.closed:
                raise Unfinished
            yield
        return self._text[self.position - self._offset]

    def skip_space(self) -> Steps[None]:
        """Read white space."""
        while True:
            pending = self.pending
            self.position += len(pending) - len(pending.lstrip())
            if self.closed or not (pending == "" or pending.isspace()):
                return
            yield

    def accept(self, literal: str) -> Steps[bool]:
        """Read ``literal`` if it comes next; nothing otherwise."""
        while not self.closed and len(self.pending) < len(literal) and literal.startswith(self.pending):
            yield
        if not self.pending.startswith(literal):
            return False
        self.position += len(literal)
        return True

    def expect(self, literal: str) -> Steps[None]:
        """Read ``literal``. Raises `Malformed` if something else comes next, `Unfinished` if the text ends."""
        if not (yield from self.accept(literal)):
            raise Unfinished if literal.startswith(self.pending) else Malformed

    def copy_until(self, markers: tuple[str, ...], sink: Callable[[str], None]) -> Steps[str]:
        """Hand the text before the first of ``markers`` to ``sink`` as it arrives.

        Only an ending that may be the beginning of a marker is held back. No marker contains another one, other than
        at its end. Returns the marker, which is not read; "" if the text ended without one.
        """
        while True:
            pending = self.pending
            end, marker = _first(pending, markers)
            if not marker and not self.closed:
                end -= _overlap(pending, markers)
            if end > 0:
                self.position += end
                sink(pending[:end])
            if marker or self.closed:
                return marker
            yield

    def read_until(self, markers: tuple[str, ...]) -> Steps[str]:
        """The text before the first of ``markers``, none of which is read. Raises `Unfinished` if none comes."""
        parts: list[str] = []
        if not (yield from self.copy_until(markers, parts.append)):
            raise Unfinished
        return "".join(parts)


def _first(text: str, markers: tuple[str, ...]) -> tuple[int, str]:
    """Where the first of the markers in ``text`` begins, and which it is; the end of the text and "" without one."""
    first, found = len(text), ""
    for marker in markers:
        position = text.find(marker, 0, first + len(marker) - 1)
        if position >= 0:
            first, found = position, marker
    return first, found


def _overlap(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest ending of ``text`` that begins a marker without completing it."""
    longest = 0
    for marker in markers:
        position = text.find(marker[0], max(0, len(text) - len(marker) + 1))
        while position >= 0 and not marker.startswith(text[position:]):
            position = text.find(marker[0], position + 1)
        if position >= 0:
            longest = max(longest, len(text) - position)
    return longest
