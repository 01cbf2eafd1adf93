"""The application: routers, what stands before them, and the errors they answer with."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from nanovllm import __version__
from nanovllm.entrypoints.serve import (
    chat_completions,
    completions,
    embeddings,
    inspector,
    messages,
    models,
    responses,
    system,
    tokens,
)
from nanovllm.entrypoints.serve.admission_metrics import AdmissionMetrics
from nanovllm.entrypoints.serve.args import ServeArgs
from nanovllm.entrypoints.serve.context import ServeContext
from nanovllm.entrypoints.serve.errors import add_handlers
from nanovllm.entrypoints.serve.metrics import add_metrics
from nanovllm.entrypoints.serve.middleware import Admit, CatchFaults, CountLoad, LimitBody, RequestIds, RequireKey
from nanovllm.errors import ParameterError

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

    from nanovllm.engine.async_llm import AsyncLLM

# A request is matched against them in turn: the busy ones come first.
ROUTERS = (
    chat_completions.router,
    completions.router,
    messages.router,
    responses.router,
    embeddings.router,
    tokens.router,
    models.router,
    system.router,
)


def build_app(engine: AsyncLLM, args: ServeArgs, tracer: Tracer | None = None) -> FastAPI:
    """The server's application.

    Args:
        engine: runs the model; it must belong to the event loop that will serve the application.
        args: the server's settings.
        tracer: makes a span for every prompt the engine is given; None: there are no traces.
    """
    docs = not args.disable_fastapi_docs
    app = FastAPI(
        title="nano-vLLM-Ascend",
        version=__version__,
        root_path=args.root_path or "",
        docs_url="/docs" if docs else None,
        redoc_url="/redoc" if docs else None,
        openapi_url="/openapi.json" if docs else None,
    )
    context = app.state.context = ServeContext(engine, args)
    for router in ROUTERS:
        app.include_router(router)
    if not args.disable_inspector:
        app.include_router(inspector.router)
    app.add_middleware(Admit, admission=context.admission)
    observer = add_metrics(app, engine, context.model_names[0])
    observer.registry.register(AdmissionMetrics(context.admission, engine, context.model_names[0]))
    add_handlers(app)
    if tracer is not None:
        from nanovllm.entrypoints.serve.tracing import ContinueTraces, RequestSpans  # needs packages of an extra

        engine.observers.append(RequestSpans(tracer, context.model_names[0]))
        app.add_middleware(ContinueTraces)
    _add_middleware(app, args)
    return app


def _add_middleware(app: FastAPI, args: ServeArgs) -> None:
    """From the handlers outwards: what is added last sees a request first."""
    app.add_middleware(CatchFaults)
    app.add_middleware(LimitBody, limit=args.max_request_body_size, memory=app.state.context.memory)
    if args.enable_server_load_tracking:
        app.add_middleware(CountLoad, context=app.state.context)
    for name in args.middleware:
        _add_named(app, name)
    if args.api_key or args.tenants is not None:
        app.add_middleware(RequireKey, admission=app.state.context.admission)
    if args.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=args.allowed_origins,
            allow_credentials=args.allow_credentials,
            allow_methods=args.allowed_methods,
            allow_headers=args.allowed_headers,
        )
    if args.enable_request_id_headers:
        app.add_middleware(RequestIds)


def _add_named(app: FastAPI, name: str) -> None:
    """Middleware by its place: ``package.module.Class``, or an async function of request and ``call_next``."""
    module, _, attribute = name.rpartition(".")
    found: Any
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ParameterError(f"cannot be imported: {error}", "middleware", name) from error
    if isinstance(found, type):
        app.add_middleware(cast(Any, found))
    elif inspect.iscoroutinefunction(found):
        app.middleware("http")(found)
    else:
        raise ParameterError("must be a class or an async function", "middleware", name)
