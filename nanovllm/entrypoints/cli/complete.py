"""``nanovllm complete``: continue texts, with a model in this process or on a server.

Every line, typed or from a pipe, is a text to continue, by itself: there is no conversation and no chat template.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import closing, nullcontext

from nanovllm.entrypoints.cli.answering import add_answering_flags, read_answering_flags
from nanovllm.entrypoints.cli.answers import Pieces, show
from nanovllm.entrypoints.cli.lines import interrupts_noted, is_typed, piped_lines, say, typed_lines
from nanovllm.entrypoints.cli.loading import load_llm
from nanovllm.entrypoints.cli.parser import CommandParser, UsageError
from nanovllm.entrypoints.cli.prompts import valid_text
from nanovllm.entrypoints.cli.remote import RemoteModel
from nanovllm.entrypoints.cli.requests import sampling_params, stream_pieces
from nanovllm.errors import ParameterError

DEFAULT_MAX_TOKENS = 256


def add_arguments(parser: CommandParser) -> None:
    """Options of the command."""
    parser.usage = "%(prog)s [options]"
    parser.epilog = (
        "Every line, typed or from a pipe, is a text to continue. Ctrl-C stops a continuation, Ctrl-D ends. "
        'Example: nanovllm complete -q "Once upon a time" --max-tokens 64'
    )
    parser.add_argument("--quick", "-q", metavar="TEXT", help="continue one text and end")
    add_answering_flags(parser, "text", DEFAULT_MAX_TOKENS)


def run(arguments: argparse.Namespace) -> int:
    """Continue texts until there are no more."""
    given, engine = read_answering_flags(arguments)
    if arguments.quick is not None and not valid_text(arguments.quick, "the text"):
        raise UsageError("--quick: the text is empty")
    if arguments.url is not None:
        given.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
        with RemoteModel(arguments.url, arguments.model_name, arguments.api_key, given) as model:
            _run(arguments, model.complete, model.banner, remote=True)
    else:
        with load_llm(engine, arguments.verbose) as llm:
            params = sampling_params(llm, given, DEFAULT_MAX_TOKENS)
            config = llm.llm_engine.model_config
            banner = f"{config.model}, a context of {config.max_model_len} tokens."
            _run(arguments, lambda text: stream_pieces(llm, text, params), banner, remote=False)
    return 0


def _run(arguments: argparse.Namespace, complete: Callable[[str], Pieces], banner: str, remote: bool) -> None:
    if arguments.quick is not None:
        show(complete(arguments.quick), stats=arguments.stats)
        return
    if not is_typed():
        for line in piped_lines():
            if line:
                show(complete(line), stats=arguments.stats)
        return
    say(f"{banner} Ctrl-D ends.")
    with closing(typed_lines("> ")) as lines:  # closed at once, so that the history of lines is saved
        for line in lines:
            if not line:
                continue
            try:
                # Waiting for a server can be interrupted anywhere, a step of an engine cannot.
                with nullcontext(lambda: False) if remote else interrupts_noted() as interrupted:
                    show(complete(line), stats=arguments.stats, interrupted=interrupted, stop_on_interrupt=remote)
            except (ParameterError, UsageError) as error:
                say(f"nanovllm: {error}")
