"""What a check has found, how bad it is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was looked at, such as "torch".
        level: a "problem" keeps the engine from running (on the device it is about), a "warning" does not.
        what: what was found.
        remedy: what to do; empty for "ok".
    """

    subject: str
    level: Level
    what: str
    remedy: str = ""


def ok(subject: str, what: str) -> Finding:
    """All is well."""
    return Finding(subject, "ok", what)


def warning(subject: str, what: str, remedy: str) -> Finding:
    """The engine runs, but not as it could."""
    return Finding(subject, "warning", what, remedy)


def problem(subject: str, what: str, remedy: str) -> Finding:
    """The engine will not run."""
    return Finding(subject, "problem", what, remedy)
