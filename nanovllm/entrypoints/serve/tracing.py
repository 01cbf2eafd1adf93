"""What a span says: one per prompt that the engine was given, with vLLM's name and attributes.

traceparent, tracestate --ContinueTraces--> the current context  \\
                              engine --RequestOutput, at the end--> RequestSpans --span--> the tracer of `otlp.py`
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opentelemetry import context
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Receive, Scope, Send

from nanovllm.entrypoints.serve.metrics import finish_reason
from nanovllm.outputs import RequestOutput

if TYPE_CHECKING:
    from nanovllm.engine.output import AnyOutput
    from nanovllm.engine.stats import StepRecord
    from nanovllm.outputs import RequestStateStats
    from nanovllm.sampling_params import SamplingParams

SPAN_NAME = "llm_request"
TRACE_HEADERS = (b"traceparent", b"tracestate")


class ContinueTraces:
    """Middleware under which spans belong to the trace that a request's W3C headers name, if they do."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        carrier: dict[str, list[str]] = {}
        for name, value in scope.get("headers", ()):
            if name in TRACE_HEADERS:
                carrier.setdefault(name.decode(), []).append(value.decode("latin-1"))
        # A span that is current already is one of whoever instruments this server, and knows of the headers.
        if not carrier or get_current_span().get_span_context().is_valid:
            await self.app(scope, receive, send)
            return
        token = context.attach(self._propagator.extract(carrier))
        try:
            await self.app(scope, receive, send)
        finally:
            context.detach(token)


class RequestSpans:
    """Follows an engine (`Observer`): a span for every request that ends.

    A request ends where its outputs are read, so the current context is that of the HTTP request it came with.

    Args:
        tracer: makes the spans.
        model_name: the model's served name.
    """

    def __init__(self, tracer: Tracer, model_name: str) -> None:
        self._tracer = tracer
        self._model_name = model_name

    def step(self, record: StepRecord) -> None:
        """A step has ended."""

    def finished(self, output: AnyOutput, params: SamplingParams) -> None:
        """A request has ended."""
        times = output.metrics
        assert times is not None
        span = self._tracer.start_span(SPAN_NAME, kind=SpanKind.SERVER, start_time=_nanoseconds(times.arrival_time))
        if span.is_recording():  # the sampler wants it
            reason = finish_reason(output)
            span.set_attributes(self._attributes(output, times, reason))
            if isinstance(output, RequestOutput):
                span.set_attributes(_asked(params))
            if reason == "error":
                span.set_status(Status(StatusCode.ERROR, _fault(output)))
        span.end(_nanoseconds(times.arrival_time + times.last_token_ts - times.arrival_ts))

    def _attributes(self, output: AnyOutput, times: RequestStateStats, reason: str) -> dict[str, Any]:
        """Times are in seconds; those of what a request did not live to see are left out."""
        found: dict[str, Any] = {
            # The engine's id is the answer's with a number behind it (`ServeContext.engine_id`).
            "gen_ai.request.id": output.request_id.rpartition("-")[0] or output.request_id,
            "gen_ai.response.model": self._model_name,
            "gen_ai.response.finish_reasons": [reason],
            "gen_ai.usage.prompt_tokens": len(output.prompt_token_ids),
            "gen_ai.usage.completion_tokens": times.num_generation_tokens,
            "gen_ai.usage.cache_read.input_tokens": output.num_cached_tokens or 0,
            "gen_ai.latency.e2e": times.last_token_ts - times.arrival_ts,
        }
        if times.scheduled_ts:
            found["gen_ai.latency.time_in_queue"] = times.scheduled_ts - times.queued_ts
            found["gen_ai.latency.time_in_model_inference"] = times.last_token_ts - times.scheduled_ts
        if times.first_token_ts:
            found["gen_ai.latency.time_to_first_token"] = times.first_token_latency
            found["gen_ai.latency.time_in_model_prefill"] = times.first_token_ts - times.scheduled_ts
            found["gen_ai.latency.time_in_model_decode"] = times.last_token_ts - times.first_token_ts
        return found


def _asked(params: SamplingParams) -> dict[str, Any]:
    asked = {
        "gen_ai.request.n": params.n,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
    }
    if params.max_tokens is not None:
        asked["gen_ai.request.max_tokens"] = params.max_tokens
    return asked


def _fault(output: AnyOutput) -> str | None:
    """What the engine says of an error."""
    if not isinstance(output, RequestOutput):
        return None
    said = [completion.stop_reason for completion in output.outputs if completion.finish_reason == "error"]
    return None if not said or said[0] is None else str(said[0])


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
