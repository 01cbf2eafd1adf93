"""Where spans go: OpenTelemetry's SDK and exporters, imported only if somebody asks for traces.

The endpoint is `ServeArgs.otlp_traces_endpoint`; all else is said by OpenTelemetry's own environment variables.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from nanovllm import __version__
from nanovllm.errors import ParameterError

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

GRPC, HTTP = "grpc", "http/protobuf"
EXPORTERS = {
    GRPC: "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
    HTTP: "opentelemetry.exporter.otlp.proto.http.trace_exporter",
}
FLUSH_LIMIT = 5.0  # seconds that the collector has for the last spans when the server ends


def check_endpoint(endpoint: str) -> None:
    """Refuse what would keep spans from arriving, before anything starts.

    Raises:
        ParameterError: the protocol is unknown, its packages are missing, or the endpoint does not fit it.
    """
    protocol = _protocol()
    if not _is_installed(EXPORTERS[protocol]):
        raise ParameterError(
            "traces need OpenTelemetry's packages: pip install 'nano-vllm-ascend[otel]'",
            "otlp_traces_endpoint",
            endpoint,
        )
    if protocol == HTTP and not endpoint.startswith(("http://", "https://")):
        raise ParameterError("must be a URL such as http://localhost:4318/v1/traces", "otlp_traces_endpoint", endpoint)


@contextlib.contextmanager
def open_tracer(endpoint: str | None) -> Iterator[Tracer | None]:
    """A tracer that sends spans to a collector in the background, until the block ends; None without an endpoint.

    Spans wait in a queue of limited size; when the collector does not keep up the newest are dropped.
    """
    if endpoint is None:
        yield None
        return
    from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    logging.getLogger("opentelemetry").handlers = logging.getLogger("nanovllm").handlers.copy()
    logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)  # batches given up, not every attempt
    exporter = _make_exporter(endpoint)
    named = Resource.create({SERVICE_NAME: "nanovllm"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=named, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    try:
        yield provider.get_tracer("nanovllm", __version__)
    finally:
        # Without a collector the exporter would go on trying for longer than anybody waits for a server to end.
        impatience = threading.Timer(FLUSH_LIMIT, exporter.shutdown)
        impatience.daemon = True
        impatience.start()
        provider.shutdown()
        impatience.cancel()


def _protocol() -> str:
    """The protocol that the environment asks for, or vLLM's default."""
    for variable in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = os.environ.get(variable)
        if protocol:
            if protocol not in EXPORTERS:
                raise ParameterError(f"must be one of {', '.join(EXPORTERS)}", variable, protocol)
            return protocol
    return GRPC


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # of one of its parents
        return False


def _make_exporter(endpoint: str) -> Any:
    if _protocol() == HTTP:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter(endpoint=endpoint)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

    return GrpcExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
