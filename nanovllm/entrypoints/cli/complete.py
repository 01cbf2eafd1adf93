"""``nanovllm complete``: continue texts, with a model in this process or on a server.

Every line, typed or from a pipe, is a text to continue, by itself: there is no conversation and no chat template.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import closing, nullcontext

from nanovllm.entrypoints.cli.answers import Pieces, show
from nanovllm.entrypoints.cli.flags import SAMPLING_HELP, add_engine_flags, add_field_flags, engine_args
from nanovllm.entrypoints.cli.lines import interrupts_noted, is_typed, piped_lines, say, typed_lines
from nanovllm.entrypoints.cli.loading import load_llm
from nanovllm.entrypoints.cli.parser import CommandParser, UsageError
from nanovllm.entrypoints.cli.prompts import valid_text
from nanovllm.entrypoints.cli.remote import RemoteModel, add_remote_flags, check_remote_flags
from nanovllm.entrypoints.cli.requests import sampling_params, stream_pieces
from nanovllm.errors import ParameterError
from nanovllm.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = 256
_SAMPLING = {name: text for name, text in SAMPLING_HELP.items() if name not in ("n", "logprobs")}


def add_arguments(parser: CommandParser) -> None:
    """Options of the command."""
    parser.usage = "%(prog)s [options]"
    parser.epilog = (
        "Every line, typed or from a pipe, is a text to continue. Ctrl-C stops a continuation, Ctrl-D ends. "
        'Example: nanovllm complete -q "Once upon a time" --max-tokens 64'
    )
    parser.add_argument("--quick", "-q", metavar="TEXT", help="continue one text and end")
    parser.add_argument("--stats", action="store_true", help="after each text, print its speed to standard error")
    parser.add_argument("--verbose", "-v", action="store_true", help="show the engine's messages")
    add_remote_flags(parser)
    sampling = parser.add_argument_group(
        "sampling", "Defaults are the model's own (generation_config.json), and these where it has none."
    )
    add_field_flags(sampling, SamplingParams, _SAMPLING, {"max_tokens": DEFAULT_MAX_TOKENS})
    add_engine_flags(parser, without=("seed", "-q"))  # --seed is the request's, -q is --quick


def run(arguments: argparse.Namespace) -> int:
    """Continue texts until there are no more."""
    given = {name: getattr(arguments, name) for name in _SAMPLING if hasattr(arguments, name)}
    engine = engine_args(arguments, without=("seed",))
    check_remote_flags(arguments, engine)
    SamplingParams(**given)  # refuses nonsense before a model is loaded
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
