"""``nanovllm serve``: the OpenAI-compatible HTTP server."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from nanovllm.entrypoints.cli.flags import add_engine_flags, engine_args
from nanovllm.entrypoints.cli.parser import CommandParser
from nanovllm.entrypoints.cli.serve_flags import add_serve_flags, serve_args
from nanovllm.entrypoints.serve.args import ServeArgs


def add_arguments(parser: CommandParser) -> None:
    """Options of the command."""
    parser.usage = "%(prog)s [MODEL] [options]"
    parser.epilog = "Example: nanovllm serve Qwen/Qwen3-0.6B --port 8000 --api-key secret"
    text = "a folder, a hub id, or 'demo', the model in the box; the same as --model"
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help=text)
    add_serve_flags(parser)
    add_engine_flags(parser, without=("reasoning_parser",))


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to end."""
    given = engine_args(arguments)
    if arguments.model_tag is not None:
        given["model"] = arguments.model_tag
    return asyncio.run(_serve(given, serve_args(arguments)))


async def _serve(engine_args: dict[str, Any], args: ServeArgs) -> int:
    from nanovllm.entrypoints.serve.server import bind, serve

    with bind(args) as listener:
        from nanovllm.entrypoints.cli.loading import load_async_llm
        from nanovllm.entrypoints.serve.app import build_app

        engine = load_async_llm(engine_args, verbose=True)
        try:
            return await serve(build_app(engine, args), engine, listener)
        finally:
            engine.shutdown()
