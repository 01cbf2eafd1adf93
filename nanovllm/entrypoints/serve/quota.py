"""Quotas per minute, and how fast things come to an end. Times are seconds of the monotonic clock."""

from __future__ import annotations

from collections import deque


class Bucket:
    """A quota that refills steadily, a minute's worth at most (a token bucket).

    What is not known before can be taken afterwards: the level may fall below zero, and nothing is left until it has
    come back.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self.per_minute = per_minute
        self._level = per_minute
        self._at = now

    def level(self, now: float) -> float:
        """What is left."""
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return self._level

    def take(self, amount: float, now: float) -> None:
        """Use up ``amount``, whether it is there or not."""
        self._level = self.level(now) - amount

    def wait(self, amount: float, now: float) -> float:
        """Seconds until ``amount`` is left."""
        return max(0.0, (amount - self.level(now)) * 60 / self.per_minute)

    def limit(self, per_minute: float, now: float) -> None:
        """Change the quota; what was used stays used."""
        used = self.per_minute - self.level(now)
        self.per_minute, self._level = per_minute, per_minute - used


class Pace:
    """How often something has ended of late."""

    MEMORY = 64  # last ends that count
    WINDOW = 60.0  # seconds; earlier ends do not count

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=self.MEMORY)

    def ended(self, now: float) -> None:
        """Something has."""
        self._ends.append(now)

    def wait(self, count: float, now: float) -> float:
        """Seconds until ``count`` more have ended, if it goes on like this; 0.0: nothing has ended of late."""
        while self._ends and now - self._ends[0] > self.WINDOW:
            self._ends.popleft()
        if not self._ends:
            return 0.0
        return count * max(now - self._ends[0], 0.0) / len(self._ends)
