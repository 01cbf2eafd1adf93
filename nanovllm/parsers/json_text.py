"""JSON read while it arrives."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from nanovllm.parsers.source import Malformed, Source, Steps, Unfinished

_SPACE = " \t\n\r"
_STRING_BREAK = re.compile(r'["\\\x00-\x1f]')
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
_HEX = frozenset("0123456789abcdefABCDEF")

# The number automaton (RFC 8259, section 6): state -> character -> state.
_DIGITS = "0123456789"
_EXPONENT = dict.fromkeys("eE", "exponent")
_NUMBER: dict[str, dict[str, str]] = {
    "minus": {"0": "zero"} | dict.fromkeys("123456789", "integer"),
    "zero": {".": "point"} | _EXPONENT,
    "integer": {".": "point"} | _EXPONENT | dict.fromkeys(_DIGITS, "integer"),
    "point": dict.fromkeys(_DIGITS, "fraction"),
    "fraction": _EXPONENT | dict.fromkeys(_DIGITS, "fraction"),
    "exponent": dict.fromkeys("+-", "sign") | dict.fromkeys(_DIGITS, "power"),
    "sign": dict.fromkeys(_DIGITS, "power"),
    "power": dict.fromkeys(_DIGITS, "power"),
}
_NUMBER_START = _NUMBER["minus"] | {"-": "minus"}
_NUMBER_END = frozenset({"zero", "integer", "fraction", "power"})


class JsonScanner:
    """Checks one JSON value, character by character, and knows where it ends.

    Strict (RFC 8259) but for one habit of language models: control characters that stand unescaped in a string are
    taken, and escaped in what `feed` returns.

    Attributes:
        complete: what was read so far is a whole value (a number may still go on).
        ended: the value is over.
        failed: a character came that no JSON has there; it was not read.
    """

    def __init__(self) -> None:
        self._state = "value"
        self._stack: list[str] = []  # the closing bracket of each open one
        self._literal = ""  # what is left of true, false or null
        self._hex_digits = 0  # digits missing after \u
        self._is_key = False
        self.complete = False
        self.ended = False
        self.failed = False

    def feed(self, text: str) -> tuple[str, int]:
        """Read on. Returns the JSON that was read and how many characters of ``text`` that were."""
        accepted: list[str] = []
        position = 0
        while position < len(text) and not (self.ended or self.failed):
            if self._state == "string":
                match = _STRING_BREAK.search(text, position)
                stop = len(text) if match is None else match.start()
                accepted.append(text[position:stop])
                position = stop
                if match is None:
                    break
            char = text[position]
            taken = self._step(char)
            if taken:
                accepted.append(char if self._state != "string" or char >= " " else json.dumps(char)[1:-1])
                position += 1
        return "".join(accepted), position

    def _step(self, char: str) -> bool:
        """Take the next character; False if the value ended before it or it does not belong there."""
        state = self._state
        if state == "string":
            if char == '"':
                self._close_string()
            elif char == "\\":
                self._state = "escape"
        elif state == "escape":
            if char == "u":
                self._state, self._hex_digits = "hex", 4
            elif char in '"\\/bfnrt':
                self._state = "string"
            else:
                return self._fail()
        elif state == "hex":
            if char not in _HEX:
                return self._fail()
            self._hex_digits -= 1
            if self._hex_digits == 0:
                self._state = "string"
        elif state == "literal":
            if char != self._literal[0]:
                return self._fail()
            self._literal = self._literal[1:]
            if not self._literal:
                self._close_value()
        elif state in _NUMBER:
            return self._step_number(char)
        elif char not in _SPACE:
            return self._step_structure(char)
        return True

    def _step_number(self, char: str) -> bool:
        following = _NUMBER[self._state].get(char)
        if following is not None:
            self._state = following
            self.complete = not self._stack and following in _NUMBER_END
            return True
        if self._state not in _NUMBER_END:
            return self._fail()
        self._close_value()
        return False if self.ended else self._step(char)

    def _step_structure(self, char: str) -> bool:
        state = self._state
        if state in ("value", "value or end"):
            if char == "]" and state == "value or end":
                self._close_bracket()
            else:
                return self._open_value(char)
        elif state in ("key", "key or end"):
            if char == '"':
                self._state, self._is_key = "string", True
            elif char == "}" and state == "key or end":
                self._close_bracket()
            else:
                return self._fail()
        elif state == "colon":
            if char != ":":
                return self._fail()
            self._state = "value"
        elif char == ",":
            self._state = "key" if self._stack[-1] == "}" else "value"
        elif char == self._stack[-1]:
            self._close_bracket()
        else:
            return self._fail()
        return True

    def _open_value(self, char: str) -> bool:
        if char == "{":
            self._stack.append("}")
            self._state = "key or end"
        elif char == "[":
            self._stack.append("]")
            self._state = "value or end"
        elif char == '"':
            self._state, self._is_key = "string", False
        elif char in _LITERALS:
            self._state, self._literal = "literal", _LITERALS[char]
        elif char in _NUMBER_START:
            self._state = _NUMBER_START[char]
            self.complete = not self._stack and self._state in _NUMBER_END
        else:
            return self._fail()
        return True

    def _close_string(self) -> None:
        if self._is_key:
            self._state = "colon"
        else:
            self._close_value()

    def _close_bracket(self) -> None:
        self._stack.pop()
        self._close_value()

    def _close_value(self) -> None:
        self._state = "after value"
        self.complete = self.ended = not self._stack

    def _fail(self) -> bool:
        self.failed = True
        return False


def copy_json(source: Source, sink: Callable[[str], None]) -> Steps[None]:
    """Hand one JSON value to ``sink`` as it arrives. Raises `Malformed` at the first wrong character, `Unfinished`."""
    scanner = JsonScanner()
    while True:
        accepted, count = scanner.feed(source.pending)
        source.skip(count)
        if accepted:
            sink(accepted)
        if scanner.failed:
            raise Malformed
        if scanner.ended or (source.closed and scanner.complete):
            return
        if source.closed:
            raise Unfinished
        yield


def read_json(source: Source) -> Steps[str]:
    """The text of one JSON value. Raises as `copy_json` does."""
    parts: list[str] = []
    yield from copy_json(source, parts.append)
    return "".join(parts)


def canonical_json(text: str) -> str:
    """``text`` as ``json.dumps(..., ensure_ascii=False)`` writes it.

    Text that is no whole JSON value (a call cut off by the token limit), or that would not survive the way through
    Python's values (numbers beyond a float, nesting beyond the stack), is returned as it is.
    """
    try:
        value = json.loads(text)
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
        written.encode()
    except UnicodeEncodeError:  # half of an escaped surrogate pair has no other form
        return json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    return written
