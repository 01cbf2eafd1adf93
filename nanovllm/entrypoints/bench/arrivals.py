"""When requests of a benchmark are sent."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from nanovllm.errors import ParameterError


@dataclass(frozen=True, slots=True)
class RampUp:
    """A request rate that changes from the first request to the last.

    Attributes:
        strategy: "linear", or "exponential" (by the same factor from request to request).
        start: requests per second at the first request.
        end: and at the last.
    """

    strategy: str
    start: float
    end: float

    def rate(self, progress: float) -> float:
        """Requests per second when this share (0 to 1) of the requests has been sent."""
        if self.strategy == "linear":
            return self.start + (self.end - self.start) * progress
        return self.start * (self.end / self.start) ** progress


def arrival_times(
    num_requests: int,
    request_rate: float,
    *,
    burstiness: float = 1.0,
    ramp_up: RampUp | None = None,
    seed: int = 0,
) -> list[float]:
    """Seconds from the start at which requests are sent.

    Intervals are drawn from a gamma distribution whose mean is one over the rate and whose shape is ``burstiness``: 1
    is exponential (a Poisson process), less comes in bursts, more is more even, infinity is exact. Without ramp-up the
    times are stretched so that the last request is sent after ``num_requests / request_rate`` seconds: the rate that is
    measured is the one that was asked for.

    Args:
        request_rate: requests per second; infinity sends all at once.

    Raises:
        ParameterError: a rate or burstiness that is not positive.
    """
    rates = {"request_rate": request_rate, "burstiness": burstiness}
    if ramp_up is not None:
        rates |= {"ramp_up_start_rps": ramp_up.start, "ramp_up_end_rps": ramp_up.end}
    for name, value in rates.items():
        if not value > 0:
            raise ParameterError("must be positive", name, value)
    if ramp_up is None and math.isinf(request_rate):
        return [0.0] * num_requests
    draw = random.Random(seed)
    times: list[float] = []
    now = 0.0
    for index in range(num_requests):
        rate = request_rate if ramp_up is None else ramp_up.rate(index / max(num_requests - 1, 1))
        now += 1 / rate if math.isinf(burstiness) else draw.gammavariate(burstiness, 1 / (rate * burstiness))
        times.append(now)
    if ramp_up is None:
        stretch = num_requests / request_rate / now
        times = [time * stretch for time in times]
    return times
