"""The server's address, and the event loop it runs on. Nothing of the web framework: this is needed before all else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Coroutine
from typing import Any, TypeVar

from nanovllm.entrypoints.serve.args import ServeArgs
from nanovllm.errors import ParameterError

Result = TypeVar("Result")

MOST_FILES = 1 << 16  # open at once, where the system sets no limit


def run_loop(main: Coroutine[Any, Any, Result]) -> Result:
    """Run ``main`` on uvloop's event loop where there is one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    result: Result = uvloop.run(main)
    return result


def raise_file_limit() -> int | None:
    """Let this process have as many files open as it may; the number, None where there is no limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else max(soft, MOST_FILES)
    if soft not in (wanted, resource.RLIM_INFINITY):
        with contextlib.suppress(OSError, ValueError):  # some systems promise more than they give
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def bind(args: ServeArgs) -> socket.socket:
    """Take the server's address; connections are accepted later.

    Raises:
        ParameterError: it is not to be had.
    """
    if args.uds is not None:
        return _bind_unix(args.uds)
    family = socket.AF_INET6 if args.host and ":" in args.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind((args.host or "", args.port))
    except (OSError, OverflowError) as error:
        listener.close()
        name = "host" if isinstance(error, socket.gaierror) else "port"
        where = f"{args.host or '0.0.0.0'}:{args.port}"
        raise ParameterError(f"cannot serve on {where}: {error}", name, getattr(args, name)) from error
    return listener


def _bind_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path) and not _answers(path):
            os.unlink(path)  # left behind by a server that is gone
        listener.bind(path)
    except OSError as error:
        listener.close()
        raise ParameterError(f"cannot serve there: {error}", "uds", path) from error
    return listener


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
    return True


def address(listener: socket.socket, args: ServeArgs) -> str:
    """Where clients find the server."""
    if args.uds is not None:
        return f"unix:{args.uds}"
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if args.ssl_certfile else 'http'}://{host}:{port}"
