"""HTTP requests in ``/metrics``, under the names of prometheus-fastapi-instrumentator, which vLLM uses."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

DURATION_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5,
                    10.0, 30.0, 60.0)  # fmt: skip


class CountRequests:
    """Middleware that counts and times requests by route; a stream lasts until its last byte.

    Requests that no route took are told apart by nothing but their status: a path may be anything.
    """

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self.app = app
        self._requests = Counter(
            "http_requests_total",
            "HTTP requests, by class of status.",
            ("method", "status", "handler"),
            registry=registry,
        )
        self._seconds = Histogram(
            "http_request_duration_seconds", "From a request's head to the last byte of the answer.",
            ("method", "handler"), registry=registry, buckets=DURATION_BUCKETS,
        )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500  # unless an answer begins

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            handler = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if handler != "none" else "none"
            self._requests.labels(method, f"{status // 100}xx", handler).inc()
            self._seconds.labels(method, handler).observe(time.perf_counter() - start)
