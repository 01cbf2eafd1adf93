"""Stop strings in a stream of text."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds the first stop string that a growing text completes, however tokens cut the text into pieces.

    Of several, the one that is complete first wins; of those complete at the same character, the one that began first.
    Unless stop strings are to stay in the text, the last ``max(len(stop)) - 1`` characters are held back, since they
    may turn out to belong to one.

    Args:
        stops: the strings; at least one, none empty.
        include: leave the stop string in the text.
    """

    __slots__ = ("_hold", "_include", "_keep", "_stops", "_tail")

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = stops
        self._include = include
        self._keep = max(map(len, stops)) - 1
        self._hold = 0 if include else self._keep
        self._tail = ""  # the last `_keep` characters of the text

    def push(self, text: str, check: bool = True) -> tuple[str, str | None]:
        """Take new text; return the text to hand out now and the stop string it completed, if any.

        With ``check`` false a stop string that these characters complete is not one.
        """
        seen = len(self._tail)
        window = self._tail + text
        if check and (match := self._first_match(window, seen)):
            start, end, stop = match
            # What include-mode has handed out before is the tail; the other mode has kept it back.
            return (window[seen:end], stop) if self._include else (window[:start], stop)
        cut = max(0, len(window) - self._keep)
        self._tail = window[cut:]
        return (window[:cut] if self._hold else text), None

    def flush(self) -> str:
        """The text has ended without a stop string: what was held back."""
        return self._tail if self._hold else ""

    def _first_match(self, window: str, seen: int) -> tuple[int, int, str] | None:
        """(start, end, string) of the match that ends first among those that end after ``seen`` characters."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = window.find(stop, max(0, seen - len(stop) + 1))
            if start >= 0:
                end = start + len(stop)
                if best is None or (end, start) < (best[1], best[0]):
                    best = (start, end, stop)
        return best
