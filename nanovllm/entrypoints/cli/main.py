"""The ``nanovllm`` command: finds the subcommand, runs it, and turns what a user can cause into one line.

``--help`` and ``--version`` import neither torch nor transformers: a subcommand's module is imported when it is called.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Collection, Sequence
from importlib import import_module

from nanovllm import __version__
from nanovllm.entrypoints.cli.parser import CommandParser, UsageError, suggestion
from nanovllm.errors import ModelError, ParameterError

# name -> (module with `add_arguments(parser)` and `run(arguments) -> exit code`, one line of help)
COMMANDS = {
    "generate": ("nanovllm.entrypoints.cli.generate", "answer a prompt, or complete it, in this process"),
    "serve": ("nanovllm.entrypoints.cli.serve", "serve a model over HTTP, as OpenAI's API"),
    "chat": ("nanovllm.entrypoints.cli.chat", "converse with a model, in this process or on a server"),
    "complete": ("nanovllm.entrypoints.cli.complete", "continue texts, in this process or on a server"),
    "run-batch": ("nanovllm.entrypoints.cli.run_batch", "answer a file of API requests, in this process"),
    "bench": ("nanovllm.entrypoints.cli.bench", "measure throughput, latency, start-up, or a server"),
    "doctor": ("nanovllm.entrypoints.cli.doctor", "say what keeps the engine from running here, and what to do"),
    "collect-env": ("nanovllm.entrypoints.cli.collect_env", "describe this machine and installation for a bug report"),
    "completion": ("nanovllm.entrypoints.cli.completion", "print a script that completes this command in a shell"),
}

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 128 + 2  # as a shell reports SIGINT
EXIT_CLOSED_PIPE = 128 + 13  # and SIGPIPE
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name; None takes the process's.

    Returns:
        The exit code: 0, 2 for an error the user can mend, 130 after Ctrl-C, 141 if the reader of a pipe went away.
        Faults of the engine itself are raised.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # a model's text has no other
    try:
        try:
            code = _run(list(sys.argv[1:] if argv is None else argv))
        except SystemExit:  # argparse, after --help and --version
            code = 0
        sys.stdout.flush()
        return code
    except (ParameterError, ModelError, UsageError) as error:
        message = " ".join(str(error).splitlines())
        print(f"nanovllm: error: {message}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return EXIT_CLOSED_PIPE
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        _drop_output()
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"nanovllm: error: {where}{error.strerror}", file=sys.stderr)
        return EXIT_USER_ERROR


def _drop_output() -> None:
    """Python flushes standard output once more at exit; give it somewhere to go."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: list[str]) -> int:
    name = argv[0] if argv and not argv[0].startswith("-") else None
    if name is not None and name not in COMMANDS:
        raise UsageError(f"there is no command {name!r}{suggestion(name, COMMANDS)} (see nanovllm --help)")
    arguments = make_parser([] if name is None else [name]).parse_args(argv)
    if name is None:
        make_parser([]).print_help()
        return 0
    return import_module(COMMANDS[name][0]).run(arguments)


def make_parser(names: Collection[str]) -> CommandParser:
    """The parser of the whole command line, with the options of the commands ``names``."""
    parser = CommandParser(
        prog="nanovllm",
        description="A small, readable, fast LLM inference engine with vLLM's interface.",
        epilog="nanovllm COMMAND --help describes a command.",
    )
    parser.add_argument("-v", "--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", parser_class=CommandParser)
    for command, (module, text) in COMMANDS.items():
        chosen = commands.add_parser(command, help=text, description=text[0].upper() + text[1:] + ".")
        if command in names:
            import_module(module).add_arguments(chosen)
    return parser
