"""``nanovllm bench``: throughput, latency and start-up of the engine, with vLLM's options, lines and JSON keys.

``bench serve`` measures a server; it is in `bench_serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.entrypoints.cli.bench_serve import run_serve
from nanovllm.entrypoints.cli.bench_serve_flags import add_serve_arguments, positive
from nanovllm.entrypoints.cli.flags import add_engine_flags, engine_args
from nanovllm.entrypoints.cli.loading import load_async_llm, load_llm
from nanovllm.entrypoints.cli.parser import CommandParser, UsageError, human_int

if TYPE_CHECKING:
    from nanovllm.config import EngineConfig
    from nanovllm.engine.tokenizer import Tokenizer
    from nanovllm.entrypoints.bench.datasets import SampleRequest

# Lengths in tokens that vLLM's random dataset has unless told otherwise.
RANDOM_INPUT_LEN = 1024
RANDOM_OUTPUT_LEN = 128


def add_arguments(parser: CommandParser) -> None:
    """Options of the command and of its own commands."""
    parser.epilog = "nanovllm bench KIND --help describes one."
    parser.set_defaults(bench=None, show_help=parser.print_help)
    kinds = parser.add_subparsers(dest="bench", metavar="KIND", title="kinds", parser_class=CommandParser)
    for kind, text, add in (
        ("throughput", "how many requests and tokens per second, if all are there at once", _add_throughput_arguments),
        ("latency", "how long one batch takes", _add_latency_arguments),
        ("startup", "how long the engine takes to start", _add_startup_arguments),
        ("serve", "how long requests to a running server take", add_serve_arguments),
    ):
        description = text[0].upper() + text[1:] + "."
        add(kinds.add_parser(kind, help=text, description=description, usage="%(prog)s [options]"))


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and write the JSON file."""
    if arguments.bench is None:
        arguments.show_help()
        return 0
    if arguments.bench == "serve":
        return run_serve(arguments)
    file = None if arguments.output_json is None else Path(arguments.output_json)
    if file is not None and not file.parent.is_dir():  # known before anything is measured
        raise UsageError(f"--output-json {file}: there is no folder {file.parent}")
    measure = {"throughput": _throughput, "latency": _latency, "startup": _startup}[arguments.bench]
    result, model_id = measure(arguments)
    print(result)
    if file is not None:
        try:
            file.write_text(json.dumps(result.to_json(model_id), indent=4) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--output-json {file}: {error.strerror}") from None
    return 0


def _add_throughput_arguments(parser: CommandParser) -> None:
    parser.add_argument("--backend", choices=("vllm", "nanovllm"), default="vllm", help="both names mean this engine")
    parser.add_argument(
        "--dataset-name", choices=("random", "sharegpt"), help="default: sharegpt if there is a file, else random"
    )
    parser.add_argument("--dataset-path", metavar="FILE", help="a ShareGPT file (JSON)")
    _add_count(parser, "--num-prompts", 1000, "requests")
    _add_count(parser, "--input-len", None, f"tokens of a random prompt (default: {RANDOM_INPUT_LEN})")
    text = f"tokens to generate (default: {RANDOM_OUTPUT_LEN}; for sharegpt those of the answer in the file)"
    _add_count(parser, "--output-len", None, text)
    _add_count(parser, "--random-input-len", None, "the same as --input-len")
    _add_count(parser, "--random-output-len", None, "the same as --output-len")
    parser.add_argument(
        "--random-range-ratio", type=float, default=0.0, metavar="R",
        help="draw random lengths from length x (1 - R) to length x (1 + R) (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--prefix-len", "--random-prefix-len", type=human_int, default=0, metavar="N",
        help="tokens that all random prompts begin with, beside --input-len (default: 0)",
    )  # fmt: skip
    _add_count(parser, "--n", 1, "outputs per request")
    parser.add_argument(
        "--num-warmups", type=human_int, default=0, metavar="N", help="requests that are run before (default: 0)"
    )
    parser.add_argument("--async-engine", action="store_true", help="measure AsyncLLM, every request a stream")
    _add_common(parser)


def _add_latency_arguments(parser: CommandParser) -> None:
    _add_count(parser, "--input-len", 32, "tokens of a prompt")
    _add_count(parser, "--output-len", 128, "tokens to generate")
    _add_count(parser, "--batch-size", 8, "requests in the batch")
    _add_count(parser, "--n", 1, "outputs per request, or the width of the beam")
    parser.add_argument("--use-beam-search", action="store_true", help="search with a beam instead of sampling")
    parser.add_argument(
        "--num-iters-warmup",
        type=human_int,
        default=10,
        metavar="N",
        help="batches before those that count (default: 10)",
    )
    _add_count(parser, "--num-iters", 30, "batches that count")
    parser.set_defaults(enable_prefix_caching=False)  # or every batch but the first would find its prompts computed
    _add_common(parser)


def _add_startup_arguments(parser: CommandParser) -> None:
    parser.add_argument("--num-iters-cold", type=positive, default=3, metavar="N", help="cold starts (default: 3)")
    parser.add_argument(
        "--num-iters-warmup", type=human_int, default=1, metavar="N", help="starts that do not count (default: 1)"
    )
    parser.add_argument("--num-iters-warm", type=positive, default=3, metavar="N", help="warm starts (default: 3)")
    parser.add_argument("--output-json", metavar="FILE", help="write the figures to this file")
    add_engine_flags(parser)


def _add_common(parser: CommandParser) -> None:
    parser.add_argument("--disable-detokenize", action="store_true", help="make no text of the outputs")
    parser.add_argument("--output-json", metavar="FILE", help="write the figures to this file")
    parser.add_argument("--verbose", "-v", action="store_true", help="show the engine's messages")
    add_engine_flags(parser)


def _add_count(parser: argparse.ArgumentParser, option: str, default: int | None, text: str) -> None:
    """An option that is a positive whole number."""
    if default is not None:
        text += f" (default: {default})"
    parser.add_argument(option, type=positive, default=default, metavar="N", help=text)


def _throughput(arguments: argparse.Namespace) -> tuple[Any, str]:
    from nanovllm.entrypoints.bench.throughput import measure_async_throughput, measure_throughput

    dataset = arguments.dataset_name or ("random" if arguments.dataset_path is None else "sharegpt")
    if (dataset == "sharegpt") != (arguments.dataset_path is not None):
        raise UsageError("--dataset-name sharegpt needs --dataset-path FILE, and random takes none")
    input_len = _one_of_two(arguments, "input_len")
    output_len = _one_of_two(arguments, "output_len")

    def requests(config: EngineConfig, tokenizer: Tokenizer | None) -> list[SampleRequest]:
        from nanovllm.entrypoints.bench.datasets import plain_token_ids, random_requests, sharegpt_requests

        if dataset == "sharegpt":
            count = arguments.num_prompts
            return sharegpt_requests(arguments.dataset_path, tokenizer, count, output_len, seed=config.seed)
        return random_requests(
            plain_token_ids(config.model, tokenizer),
            arguments.num_prompts,
            input_len or RANDOM_INPUT_LEN,
            output_len or RANDOM_OUTPUT_LEN,
            prefix_len=arguments.prefix_len,
            range_ratio=arguments.random_range_ratio,
            seed=config.seed,
        )

    options = {
        "n": arguments.n,
        "detokenize": not arguments.disable_detokenize,
        "num_warmups": arguments.num_warmups,
        "use_tqdm": sys.stderr.isatty(),
    }
    if arguments.async_engine:
        engine = load_async_llm(engine_args(arguments), arguments.verbose)
        try:
            chosen = requests(engine.config, engine.input.tokenizer)
            return asyncio.run(measure_async_throughput(engine, chosen, **options)), engine.model_config.model
        finally:
            engine.shutdown()
    with load_llm(engine_args(arguments), arguments.verbose) as llm:
        chosen = requests(llm.llm_engine.config, llm.get_tokenizer())
        return measure_throughput(llm, chosen, **options), llm.llm_engine.model_config.model


def _latency(arguments: argparse.Namespace) -> tuple[Any, str]:
    from nanovllm.entrypoints.bench.datasets import plain_token_ids, random_requests
    from nanovllm.entrypoints.bench.latency import measure_latency

    with load_llm(engine_args(arguments), arguments.verbose) as llm:
        config = llm.llm_engine.config
        ids = plain_token_ids(config.model, llm.get_tokenizer())
        result = measure_latency(
            llm,
            random_requests(ids, arguments.batch_size, arguments.input_len, arguments.output_len, seed=config.seed),
            n=arguments.n,
            use_beam_search=arguments.use_beam_search,
            detokenize=not arguments.disable_detokenize,
            num_warmups=arguments.num_iters_warmup,
            num_iterations=arguments.num_iters,
            use_tqdm=sys.stderr.isatty(),
        )
    return result, config.model.model


def _startup(arguments: argparse.Namespace) -> tuple[Any, str]:
    from nanovllm.config import EngineArgs
    from nanovllm.entrypoints.bench.startup import measure_startup

    given = engine_args(arguments)
    config = EngineArgs.from_kwargs(**given).build()  # what can be refused is, and a model is downloaded before
    result = measure_startup(
        given,
        config.model.path,
        num_cold=arguments.num_iters_cold,
        num_warmups=arguments.num_iters_warmup,
        num_warm=arguments.num_iters_warm,
        use_tqdm=sys.stderr.isatty(),
    )
    return result, config.model.model


def _one_of_two(arguments: argparse.Namespace, name: str) -> int | None:
    """A length that has two names."""
    plain, other = getattr(arguments, name), getattr(arguments, f"random_{name}")
    if plain is not None and other is not None and plain != other:
        option = name.replace("_", "-")
        raise UsageError(f"--{option} {plain} and --random-{option} {other} contradict each other")
    return plain if plain is not None else other
