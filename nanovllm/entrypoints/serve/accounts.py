"""What tenants have used, and what they may use yet. Times are seconds of the monotonic clock."""

from __future__ import annotations

import math
from collections import Counter

from nanovllm.entrypoints.serve.errors import ServeError
from nanovllm.entrypoints.serve.quota import Bucket, Pace
from nanovllm.entrypoints.serve.tenants import Tenant

REASONS = ("requests", "tokens", "concurrency", "queue")  # why a request is refused


class Account:
    """One tenant's.

    Attributes:
        tenant: its settings.
        num_calls: requests under way.
        num_requests, num_prompt_tokens, num_generated_tokens: totals; tokens count when a prompt is queued, and when
            its outputs have ended.
        rejected: requests that were refused, by reason.
    """

    def __init__(self, tenant: Tenant, now: float) -> None:
        self.num_calls = 0
        self.num_requests = self.num_prompt_tokens = self.num_generated_tokens = 0
        self.rejected: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self._pace = Pace()
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self.change(tenant, now)

    def change(self, tenant: Tenant, now: float) -> None:
        """Have new settings. What was used stays used."""
        self.tenant = tenant
        self._requests = _changed(self._requests, tenant.requests_per_minute, now)
        self._tokens = _changed(self._tokens, tenant.tokens_per_minute, now)

    def check(self, now: float) -> None:
        """Whether there is quota for one more request.

        Raises:
            ServeError: there is not; its headers say when there will be.
        """
        tenant = self.tenant
        most = tenant.max_concurrent_requests
        if most is not None and self.num_calls >= most:
            raise self._refusal("concurrency", f"{most} requests at a time", self._pace.wait(1, now), now)
        if self._requests is not None and (seconds := self._requests.wait(1, now)) > 0:
            raise self._refusal("requests", f"{tenant.requests_per_minute:g} requests per minute", seconds, now)
        if self._tokens is not None and (seconds := self._tokens.wait(1, now)) > 0:
            raise self._refusal("tokens", f"{tenant.tokens_per_minute:g} tokens per minute", seconds, now)

    def open(self, now: float) -> None:
        """A request has been admitted."""
        self.num_calls += 1
        self.num_requests += 1
        if self._requests is not None:
            self._requests.take(1, now)

    def close(self, now: float) -> None:
        """It has been answered."""
        self.num_calls -= 1
        self._pace.ended(now)

    def use(self, prompt: int, generated: int, now: float) -> None:
        """It has used tokens. How many is not known before, so the quota may be exceeded, and then nothing is left."""
        self.num_prompt_tokens += prompt
        self.num_generated_tokens += generated
        if self._tokens is not None:
            self._tokens.take(prompt + generated, now)

    def headers(self, now: float) -> dict[str, str]:
        """How much is left of the quotas, and in how long all of it will be; OpenAI's names."""
        found = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = f"{bucket.per_minute:.0f}"
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level(now))))
                found[f"x-ratelimit-reset-{name}"] = duration(bucket.wait(bucket.per_minute, now))
        return found

    def _refusal(self, reason: str, quota: str, seconds: float, now: float) -> ServeError:
        self.rejected[reason] += 1
        wait = whole_seconds(seconds)
        message = f"Rate limit reached for {self.tenant.name}: {quota}. Please try again in {wait} s."
        return ServeError(429, message, headers={"Retry-After": str(wait), **self.headers(now)})


def whole_seconds(seconds: float) -> int:
    """For ``Retry-After``: at least one, and no more than a minute, since estimates do not reach further."""
    return min(max(math.ceil(seconds), 1), 60)


def duration(seconds: float) -> str:
    """As OpenAI writes it: 120ms, 1.5s, 6m0s."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds / 1000, 60)
    return f"{minutes:.0f}m{rest:g}s" if minutes else f"{rest:g}s"


def _changed(bucket: Bucket | None, per_minute: float | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, now)
    bucket.limit(per_minute, now)
    return bucket
