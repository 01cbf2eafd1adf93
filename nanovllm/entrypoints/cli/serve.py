"""``nanovllm serve``: the OpenAI-compatible HTTP server."""

from __future__ import annotations

import argparse

from nanovllm.config import EngineArgs
from nanovllm.entrypoints.cli.flags import add_engine_flags, engine_args
from nanovllm.entrypoints.cli.parser import CommandParser
from nanovllm.entrypoints.cli.serve_flags import add_serve_flags, serve_args
from nanovllm.entrypoints.cli.vllm_flags import add_vllm_flags, judge_vllm_flags
from nanovllm.entrypoints.log import setup_logging
from nanovllm.entrypoints.serve.args import ServeArgs
from nanovllm.entrypoints.serve.listener import bind, run_loop
from nanovllm.entrypoints.serve.otlp import open_tracer


def add_arguments(parser: CommandParser) -> None:
    """Options of the command."""
    parser.usage = "%(prog)s [MODEL] [options]"
    parser.epilog = "Example: nanovllm serve Qwen/Qwen3-0.6B --port 8000 --api-key secret"
    text = "a folder, a hub id, or 'demo', the model in the box; the same as --model"
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help=text)
    add_serve_flags(parser)
    add_engine_flags(parser, without=("reasoning_parser",))
    add_vllm_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to end."""
    setup_logging()
    judge_vllm_flags(arguments)
    given = engine_args(arguments)
    given.setdefault("disable_log_stats", False)
    if arguments.model_tag is not None:
        given["model"] = arguments.model_tag
    args = serve_args(arguments)
    if args.reasoning_parser:
        given["reasoning_parser"] = args.reasoning_parser
    return run_loop(_serve(EngineArgs.from_kwargs(**given), args))


async def _serve(engine_args: EngineArgs, args: ServeArgs) -> int:
    from nanovllm.engine.spawn import spawn

    with bind(args) as listener:
        # The engine's process loads the model while this one imports the rest of itself.
        process = spawn(engine_args.build())
        from nanovllm.engine.async_llm import AsyncLLM

        engine = AsyncLLM.launch(process, max_restarts=args.max_engine_restarts)
        try:
            from nanovllm.entrypoints.serve.app import build_app
            from nanovllm.entrypoints.serve.server import serve

            with open_tracer(args.otlp_traces_endpoint) as tracer:
                app = build_app(engine, args, tracer)
                await engine.ready()
                return await serve(app, engine, listener)
        finally:
            engine.shutdown()
