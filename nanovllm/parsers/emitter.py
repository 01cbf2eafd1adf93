"""Collects the events a parser finds."""

from __future__ import annotations

from nanovllm.parsers.events import Content, Event, Reasoning, ToolCallArguments, ToolCallStart


class Emitter:
    """Joins neighbouring pieces, numbers the calls, and holds back what may have to be taken back.

    White space at the beginning of the content and after a call is layout around the calls: it is held until other
    content follows, and dropped if a call does.

    Args:
        hold_calls: hand a call out when it is over, so that one that turns out malformed can be taken back whole.
        trim: the answer may contain calls.
        calls_only: the answer consists of calls: what else there is, is the head of one that was cut off.
    """

    def __init__(self, hold_calls: bool, trim: bool, calls_only: bool = False) -> None:
        self._hold_calls = hold_calls
        self._calls_only = calls_only
        self._events: list[Event] = []
        self._held: list[Event] | None = None  # events of the current call, while they are held
        self._blank: str | None = "" if trim else None  # white space so far; None after other content
        self.num_calls = 0
        self.call_started = False

    def reasoning(self, text: str) -> None:
        self._events.append(Reasoning(text))

    def content(self, text: str) -> None:
        if self._calls_only:
            return
        if self._blank is not None:
            text = self._blank + text
            if not text or text.isspace():
                self._blank = text
                return
            self._blank = None
        self._events.append(Content(text))

    def begin_call(self) -> None:
        """What follows may be a call."""
        self._held = [] if self._hold_calls else None
        self.call_started = False

    def call(self, name: str) -> None:
        self._add(ToolCallStart(self.num_calls, name))
        self.num_calls += 1
        self.call_started = True

    def arguments(self, fragment: str) -> None:
        self._add(ToolCallArguments(self.num_calls - 1, fragment))

    def take_back(self) -> bool:
        """Forget the current call; False if it has been handed out already."""
        if self.call_started and self._held is None:
            return False
        self.num_calls -= self.call_started
        self.call_started = False
        self._held = None
        return True

    def end_call(self) -> None:
        """The current call stands."""
        self._events += self._held or []
        self._held = None
        self._blank = ""

    def finish(self) -> None:
        """Nothing follows."""
        if self._blank and self.num_calls == 0:
            self._events.append(Content(self._blank))
        self._blank = None

    def take(self) -> list[Event]:
        """The events since the last time, neighbouring pieces joined."""
        events, self._events = self._events, []
        return events if len(events) < 2 else _join(events)

    def _add(self, event: Event) -> None:
        if self._held is not None:
            self._held.append(event)
        else:
            self._blank = ""
            self._events.append(event)


def _join(events: list[Event]) -> list[Event]:
    joined: list[Event] = []
    pieces: list[str] = []
    for event, following in zip(events, [*events[1:], None], strict=True):
        if isinstance(event, ToolCallStart):
            joined.append(event)
            continue
        pieces.append(event.fragment if isinstance(event, ToolCallArguments) else event.text)
        if type(event) is type(following) and getattr(event, "index", 0) == getattr(following, "index", 0):
            continue
        text = "".join(pieces)
        pieces.clear()
        joined.append(
            ToolCallArguments(event.index, text) if isinstance(event, ToolCallArguments) else type(event)(text)
        )
    return joined
