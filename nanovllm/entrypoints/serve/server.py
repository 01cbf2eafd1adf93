"""The server's life: take the address, load the model, serve, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import uvicorn
from fastapi import FastAPI

from nanovllm.entrypoints.serve.args import ServeArgs
from nanovllm.entrypoints.serve.connections import ACCEPTED_AT_ONCE, Connections
from nanovllm.entrypoints.serve.listener import address, raise_file_limit
from nanovllm.entrypoints.serve.memory import share_pools

if TYPE_CHECKING:
    from nanovllm.engine.async_llm import AsyncLLM
    from nanovllm.entrypoints.serve.context import ServeContext

logger = logging.getLogger(__name__)

EXIT_ENGINE_DEAD = 70  # "internal software error" of sysexits.h
TICK = 1.0  # seconds between looks at the engine, the clients and the clock
BACKLOG = 4096  # connections that wait to be accepted; the kernel may allow fewer (net.core.somaxconn)


class Server(uvicorn.Server):
    """uvicorn's server, woken by signals instead of asking for them ten times a second."""

    def __init__(
        self, config: uvicorn.Config, engine: AsyncLLM, context: ServeContext, connections: Connections
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._context = context
        self._connections = connections
        self._wake = asyncio.Event()

    def stop(self) -> None:
        """Take no more requests and end when those under way are done; called again, do not wait for them."""
        if self.should_exit:
            self.force_exit = True
        else:
            logger.info("Shutting down: requests under way have %g s to end.", self._context.args.shutdown_timeout)
        self._context.draining = self.should_exit = True
        self._engine.viewers.close()  # their streams have no end of their own
        self._wake.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections, and say so."""
        asyncio.get_running_loop().set_exception_handler(self._connections.judge)
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)
        logger.info("Application startup complete.")

    async def main_loop(self) -> None:
        """Until `stop` is called or the engine dies."""
        while not self.should_exit and not self._engine.errored:
            await self.on_tick(0)  # the Date header
            self._connections.look(self.server_state.connections)
            self._context.memory.look(len(self.server_state.connections))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), TICK)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and wait for those that are being answered."""
        if self.config.is_ssl:  # closing politely would wait half a minute for clients that do not listen
            for connection in list(self.server_state.connections):
                cycle = getattr(connection, "cycle", None)
                if cycle is None or cycle.response_complete:
                    cast(Any, connection).transport.abort()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM stop the server; SIGHUP reads the file of tenants again."""
        loop = asyncio.get_running_loop()
        handled: dict[signal.Signals, Callable[[], None]] = {}
        if hasattr(signal, "SIGHUP"):  # not on Windows
            handled = {signal.SIGINT: self.stop, signal.SIGTERM: self.stop}
            if self._context.admission.has_tenants:
                handled[signal.SIGHUP] = self._context.admission.reload
        for each, handler in handled.items():
            loop.add_signal_handler(each, handler)
        try:
            yield
        finally:
            for each in handled:
                loop.remove_signal_handler(each)


async def serve(app: FastAPI, engine: AsyncLLM, listener: socket.socket) -> int:
    """Serve until a signal or the end of the engine.

    Returns:
        The exit code: 0, or `EXIT_ENGINE_DEAD`.
    """
    context: ServeContext = app.state.context
    args = context.args
    share_pools()
    connections = Connections(engine.stats, args.client_timeout, raise_file_limit())
    server = Server(_uvicorn_config(app, args, connections), engine, context, connections)
    logging.getLogger("uvicorn").handlers = logging.getLogger("nanovllm").handlers.copy()
    gc.collect()
    gc.freeze()
    logger.info("Serving %s on %s", ", ".join(context.model_names), address(listener, args))
    try:
        with server.capture_signals():
            await server._serve([listener])
    finally:
        if args.uds is not None:
            with contextlib.suppress(OSError):
                os.unlink(args.uds)
    if engine.errored:
        logger.error("The engine has stopped: %s", engine.dead_error)
        return EXIT_ENGINE_DEAD
    return 0


def _uvicorn_config(app: FastAPI, args: ServeArgs, connections: Connections) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=connections.protocol(),
        backlog=ACCEPTED_AT_ONCE,  # asyncio takes so many at a time
        lifespan="off",
        ws="none",
        log_config=None,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        root_path=args.root_path or "",
        server_header=False,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers,
        h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
        timeout_graceful_shutdown=int(args.shutdown_timeout),
    )
