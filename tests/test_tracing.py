"""Traces: one span per prompt with vLLM's name and attributes, in the trace of the client, at a collector."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from fake_executor import FakeExecutor, engine_config
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import served
from test_import_time import modules_loaded_by

from nanovllm import AsyncLLM, PoolingParams, SamplingParams
from nanovllm.entrypoints.cli.main import main
from nanovllm.entrypoints.serve import otlp
from nanovllm.entrypoints.serve.app import build_app
from nanovllm.entrypoints.serve.args import ServeArgs
from nanovllm.entrypoints.serve.otlp import check_endpoint, open_tracer
from nanovllm.errors import EngineGenerateError, ParameterError

pytest.importorskip("opentelemetry.sdk", reason="pip install 'nano-vllm-ascend[otel]'")

from opentelemetry import context
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, get_current_span, use_span

from nanovllm.entrypoints.serve.tracing import ContinueTraces, RequestSpans

COMPLETIONS = "/v1/completions"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
WHOLE_LIFE = {  # attributes of a request that has generated tokens
    "gen_ai.request.id", "gen_ai.request.n", "gen_ai.request.temperature", "gen_ai.request.top_p",
    "gen_ai.request.max_tokens", "gen_ai.response.model", "gen_ai.response.finish_reasons",
    "gen_ai.usage.prompt_tokens", "gen_ai.usage.completion_tokens", "gen_ai.usage.cache_read.input_tokens",
    "gen_ai.latency.e2e", "gen_ai.latency.time_in_queue", "gen_ai.latency.time_to_first_token",
    "gen_ai.latency.time_in_model_prefill", "gen_ai.latency.time_in_model_decode",
    "gen_ai.latency.time_in_model_inference",
}  # fmt: skip


class Traced:
    """An engine without a model, and the spans of its requests."""

    def __init__(self, **executor: Any) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = provider.get_tracer("test")
        self.llm = AsyncLLM(engine_config(), FakeExecutor(num_blocks=200, **executor))

    @property
    def spans(self) -> list[ReadableSpan]:
        """In the order in which they have ended."""
        return list(self.exporter.get_finished_spans())

    async def ask(self, prompt: list[int], request_id: str = "cmpl-a-0", **params: Any) -> None:
        asked = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **params})
        async for _ in self.llm.generate(prompt, asked, request_id):
            pass


@contextlib.contextmanager
def traced(**executor: Any) -> Iterator[Traced]:
    found = Traced(**executor)
    found.llm.observers.append(RequestSpans(found.tracer, "tiny"))
    try:
        yield found
    finally:
        found.llm.shutdown()


@pytest.fixture
def engine() -> Iterator[Traced]:
    with traced(seconds=0.001) as found:
        yield found


# -- what a span says -------------------------------------------------------------------------------------------------


def test_a_request_is_one_span_with_vllms_name_and_attributes(engine: Traced):
    before = time.time()
    asyncio.run(engine.ask([1, 2, 3], "cmpl-abc-7", temperature=0.5, top_p=0.9, n=2, max_tokens=5))
    after = time.time()
    (span,) = engine.spans
    said = span.attributes
    assert (span.name, span.kind, span.parent) == ("llm_request", SpanKind.SERVER, None)
    assert set(said) == WHOLE_LIFE
    assert said["gen_ai.request.id"] == "cmpl-abc" and said["gen_ai.response.model"] == "tiny"
    assert (said["gen_ai.request.temperature"], said["gen_ai.request.top_p"]) == (0.5, 0.9)
    assert (said["gen_ai.request.n"], said["gen_ai.request.max_tokens"]) == (2, 5)
    assert (said["gen_ai.usage.prompt_tokens"], said["gen_ai.usage.completion_tokens"]) == (3, 10)
    assert said["gen_ai.response.finish_reasons"] == ("length",) and span.status.status_code == StatusCode.UNSET
    queue, prefill, decode = (
        said[f"gen_ai.latency.{name}"] for name in ("time_in_queue", "time_in_model_prefill", "time_in_model_decode")
    )
    first, whole, inference = (
        said[f"gen_ai.latency.{name}"] for name in ("time_to_first_token", "e2e", "time_in_model_inference")
    )
    assert queue >= 0 and prefill >= 0.001 and decode >= 4 * 0.001
    assert queue + prefill <= first <= whole and inference == pytest.approx(prefill + decode)
    assert first + decode == pytest.approx(whole)
    assert before <= span.start_time / 1e9 <= span.end_time / 1e9 <= after
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(whole, abs=1e-5)


def test_a_prompt_found_in_the_cache_says_so_and_a_request_without_limit_names_none(engine: Traced):
    async def twice() -> None:
        await engine.ask([1] * 9)
        await engine.ask([1] * 9, "cmpl-a-1", max_tokens=None, temperature=0.0)

    asyncio.run(twice())
    first, second = (span.attributes for span in engine.spans)
    assert first["gen_ai.usage.cache_read.input_tokens"] == 0
    assert second["gen_ai.usage.cache_read.input_tokens"] == 8  # two blocks
    assert set(second) == WHOLE_LIFE - {"gen_ai.request.max_tokens"} and second["gen_ai.request.temperature"] == 0.0


def test_a_vector_has_a_span_without_sampling(engine: Traced):
    async def embed() -> None:
        async for _ in engine.llm.encode([1, 2], PoolingParams(), "embd-a-0"):
            pass

    asyncio.run(embed())
    (span,) = engine.spans
    assert span.attributes["gen_ai.request.id"] == "embd-a"
    assert span.attributes["gen_ai.usage.prompt_tokens"] == 2
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert not [name for name in span.attributes if name.startswith("gen_ai.request.") and not name.endswith(".id")]


def test_a_failed_step_makes_a_span_with_the_fault():
    with traced(failing_steps=frozenset(range(2, 100))) as engine:
        with pytest.raises(EngineGenerateError):
            asyncio.run(engine.ask([1, 2]))
        (span,) = engine.spans
        assert span.status.status_code == StatusCode.ERROR
        assert "the device is on fire" in str(span.status.description)
        assert span.attributes["gen_ai.response.finish_reasons"] == ("error",)


def test_who_leaves_the_queue_has_a_span_with_what_it_lived_to_see(engine: Traced):
    async def leave() -> None:
        running = [asyncio.create_task(engine.ask([1], f"cmpl-{i}-0", max_tokens=100)) for i in range(8)]  # all rows
        waiting = asyncio.create_task(engine.ask([1, 2], "cmpl-late-0", max_tokens=100))
        while engine.llm.stats.num_waiting != 1:
            await asyncio.sleep(0.001)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    asyncio.run(leave())
    first, *others = engine.spans
    assert first.attributes["gen_ai.request.id"] == "cmpl-late" and len(others) == 8
    assert all(span.attributes["gen_ai.response.finish_reasons"] == ("abort",) for span in engine.spans)
    assert [name for name in first.attributes if name.startswith("gen_ai.latency.")] == ["gen_ai.latency.e2e"]


def test_a_refused_prompt_has_no_span(engine: Traced):
    with pytest.raises(ParameterError):
        asyncio.run(engine.ask([1] * 500))
    assert engine.spans == []


# -- whose trace it belongs to ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def application() -> Iterator[tuple[Traced, httpx.AsyncClient]]:
    found = Traced(seconds=0.001)
    transport = httpx.ASGITransport(build_app(found.llm, ServeArgs(served_model_name=["tiny"]), found.tracer))
    try:
        yield found, httpx.AsyncClient(transport=transport, base_url="http://server")
    finally:
        found.llm.shutdown()


BODY = {"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2], [3, 4], [5]]], ids=["one", "three"])
def test_spans_belong_to_the_clients_trace(stream: bool, prompt: Any):
    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        headers = {"traceparent": TRACEPARENT, "tracestate": "shop=1,cart=2", "x-request-id": "mine"}
        return await client.post(COMPLETIONS, json={**BODY, "stream": stream, "prompt": prompt}, headers=headers)

    with application() as (engine, client):
        answer = asyncio.run(ask(client))
        assert answer.status_code == 200, answer.text
        assert len(engine.spans) == (1 if prompt == [1, 2] else 3)
        for span in engine.spans:
            assert span.parent is not None and span.parent.is_remote
            assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
            assert span.context.trace_state.to_header() == "shop=1,cart=2"
            assert span.attributes["gen_ai.request.id"] == "cmpl-mine"


def test_requests_at_the_same_time_keep_to_their_traces():
    traces = [f"{number:032x}" for number in range(1, 17)]

    async def ask_all(client: httpx.AsyncClient) -> None:
        async def ask(number: int) -> None:
            headers = {"x-request-id": str(number)}
            if number % 3:  # the others begin traces of their own
                headers["traceparent"] = f"00-{traces[number]}-{PARENT}-01"
            body = {**BODY, "prompt": [number + 1], "stream": bool(number % 2), "max_tokens": 3 + number}
            assert (await client.post(COMPLETIONS, json=body, headers=headers)).status_code == 200

        await asyncio.gather(*map(ask, range(16)))

    with application() as (engine, client):
        asyncio.run(ask_all(client))
        found = {int(span.attributes["gen_ai.request.id"].removeprefix("cmpl-")): span for span in engine.spans}
        assert sorted(found) == list(range(16))
        for number, span in found.items():
            assert (f"{span.context.trace_id:032x}" == traces[number]) == bool(number % 3)
            assert (span.parent is not None) == bool(number % 3)


@pytest.mark.parametrize(
    ("header", "spans"),
    [
        (f"00-{TRACE}-{PARENT}-00", 0),  # the client does not record this one
        ("nonsense", 1),
        (f"00-{'0' * 32}-{PARENT}-01", 1),
        (f"ff-{TRACE}-{PARENT}-01", 1),
    ],
)
def test_unrecorded_and_malformed_parents(header: str, spans: int):
    async def ask(client: httpx.AsyncClient) -> int:
        return (await client.post(COMPLETIONS, json=BODY, headers={"traceparent": header})).status_code

    with application() as (engine, client):
        assert asyncio.run(ask(client)) == 200
        assert len(engine.spans) == spans
        assert all(span.parent is None for span in engine.spans)


def test_a_span_that_is_current_already_stays_the_parent():
    """Whoever instruments the server has a span for the HTTP request, below the client's."""
    with application() as (engine, client):
        instrumented = engine.tracer.start_span("POST")

        async def ask() -> None:
            with use_span(instrumented):
                await client.post(COMPLETIONS, json=BODY, headers={"traceparent": TRACEPARENT})

        asyncio.run(ask())
        (span,) = engine.spans
        assert span.parent is not None and span.parent.span_id == instrumented.get_span_context().span_id


header_bytes = st.sampled_from([TRACEPARENT.encode(), b"00-\xff", b"a=b", b"a=b,c=\x00", b"," * 600]) | st.binary()


@settings(max_examples=100, deadline=None)
@given(parents=st.lists(header_bytes, max_size=2), states=st.lists(header_bytes, max_size=2))
def test_no_header_makes_a_fault_or_outlives_its_request(parents: list[bytes], states: list[bytes]):
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(get_current_span())

    headers = [(b"traceparent", value) for value in parents] + [(b"tracestate", value) for value in states]
    before = context.get_current()
    call = ContinueTraces(app)({"type": "http", "headers": headers}, None, None)  # type: ignore[arg-type]
    with pytest.raises(StopIteration):  # it has run to its end
        call.send(None)
    assert len(seen) == 1 and context.get_current() == before
    assert seen[0].get_span_context().is_valid == (parents[:1] == [TRACEPARENT.encode()])


# -- collectors -------------------------------------------------------------------------------------------------------


class Collector:
    """What an OpenTelemetry collector has received: (attributes of the resource, span)."""

    def __init__(self) -> None:
        self.received: list[tuple[dict[str, str], Any]] = []

    def take(self, request: ExportTraceServiceRequest) -> None:
        for group in request.resource_spans:
            resource = {each.key: each.value.string_value for each in group.resource.attributes}
            self.received += [(resource, span) for scope in group.scope_spans for span in scope.spans]

    def wait_for(self, count: int, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while len(self.received) < count and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(self.received) == count


@contextlib.contextmanager
def http_collector() -> Iterator[tuple[Collector, str]]:
    """A collector that speaks OTLP over HTTP, and its endpoint."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
            collector.take(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield collector, f"http://127.0.0.1:{server.server_port}/v1/traces"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def grpc_collector() -> Iterator[tuple[Collector, str]]:
    """A collector that speaks OTLP over gRPC, and its endpoint."""
    import grpc
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import add_TraceServiceServicer_to_server

    collector = Collector()

    class Service:
        def Export(self, request: ExportTraceServiceRequest, _: Any) -> ExportTraceServiceResponse:
            collector.take(request)
            return ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(1))
    add_TraceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_a_server_sends_its_spans_to_a_collector_the_last_ones_when_it_ends():
    with http_collector() as (collector, endpoint):
        http = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
        soon = {**http, "OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_RESOURCE_ATTRIBUTES": "zone=here"}
        with served("--otlp-traces-endpoint", endpoint, **soon) as server:
            chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
            answer = server.ask("/v1/chat/completions", chat, headers={"traceparent": TRACEPARENT})
            collector.wait_for(1)
            resource, span = collector.received[0]
            said = {each.key: each.value for each in span.attributes}
            assert (resource["service.name"], resource["zone"]) == ("nanovllm", "here")
            assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("llm_request", TRACE, PARENT)
            assert said["gen_ai.request.id"].string_value == answer["id"]
            assert said["gen_ai.usage.prompt_tokens"].int_value == answer["usage"]["prompt_tokens"]
            assert said["gen_ai.usage.completion_tokens"].int_value == answer["usage"]["completion_tokens"]
        late = {**http, "OTEL_BSP_SCHEDULE_DELAY": "60000", "OTEL_SERVICE_NAME": "mine"}
        with served("--otlp-traces-endpoint", endpoint, **late) as server:
            server.ask(COMPLETIONS, {"prompt": "x", "max_tokens": 2})
            assert len(collector.received) == 1
            assert server.stop() == 0
            assert len(collector.received) == 2 and collector.received[1][0]["service.name"] == "mine"


@pytest.mark.parametrize("protocol", [None, "grpc"])
def test_grpc_is_the_default(protocol: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_PROTOCOL", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", raising=False)
    if protocol is not None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    with grpc_collector() as (collector, endpoint), open_tracer(endpoint) as tracer:
        assert tracer is not None
        tracer.start_span("a").end()
        tracer.start_span("b").end()
    assert [span.name for _, span in collector.received] == ["a", "b"]


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_collector_that_is_gone_does_not_hold_up_the_end_nor_fill_the_log(
    protocol: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(otlp, "FLUSH_LIMIT", 0.5)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with open_tracer(f"http://127.0.0.1:{port}/v1/traces") as tracer:
        assert tracer is not None
        tracer.start_span("lost").end()
        start = time.monotonic()
    assert time.monotonic() - start < 4.0  # the exporter alone would try for ten seconds
    assert {record.levelname for record in caplog.records} <= {"ERROR"} and len(caplog.records) <= 1


# -- asking for it ----------------------------------------------------------------------------------------------------


def test_without_being_asked_nothing_of_it_is_loaded():
    code = (
        "from nanovllm.entrypoints.cli.main import make_parser; from nanovllm.entrypoints.cli.serve_flags import *\n"
        "args = serve_args(make_parser(['serve']).parse_args(['serve']))\n"
        "from nanovllm.entrypoints.serve import app, server\n"
        "from nanovllm.entrypoints.serve.otlp import open_tracer\n"
        "with open_tracer(args.otlp_traces_endpoint) as tracer: assert tracer is None\n"
        # FastAPI may load the interface, which does nothing without the rest.
        "import sys; loaded = [name for name in sys.modules if name.startswith('opentelemetry.')]\n"
        "assert not [name for name in loaded if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))]\n"
    )
    assert not {"grpc", "google"} & modules_loaded_by(code)


def test_without_being_asked_nobody_follows_the_engine():
    llm = AsyncLLM(engine_config(), FakeExecutor())
    before = len(llm.observers)
    app = build_app(llm, ServeArgs())
    assert not [each for each in llm.observers[before:] if isinstance(each, RequestSpans)]
    assert ContinueTraces not in [each.cls for each in app.user_middleware]
    llm.shutdown()


@pytest.mark.parametrize("missing", ["opentelemetry", "opentelemetry.exporter.otlp", *otlp.EXPORTERS.values()])
def test_missing_packages_are_an_error_that_names_the_extra(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    protocol = next((name for name, module in otlp.EXPORTERS.items() if module == missing), "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    for name in [name for name in sys.modules if name == missing or name.startswith(missing + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["serve", "demo", "--otlp-traces-endpoint", "http://localhost:4318/v1/traces"]) == 2
    assert "pip install 'nano-vllm-ascend[otel]'" in capsys.readouterr().err


def test_an_unknown_protocol_and_an_endpoint_that_is_no_url_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json")
    with pytest.raises(ParameterError, match="must be one of grpc, http/protobuf") as found:
        check_endpoint("http://localhost:4318/v1/traces")
    assert found.value.parameter == "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    with pytest.raises(ParameterError, match="must be a URL such as http://localhost:4318/v1/traces"):
        check_endpoint("localhost:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc")
    check_endpoint("localhost:4317")
