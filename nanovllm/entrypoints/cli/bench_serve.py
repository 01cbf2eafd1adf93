"""``nanovllm bench serve``: a client that measures a running server, with vLLM's options, table and JSON keys."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.entrypoints.cli.bench_serve_flags import (
    DEFAULT_OUTPUT_LEN,
    GOODPUT_METRICS,
    METRICS,
    SAMPLING,
)
from nanovllm.entrypoints.cli.parser import UsageError, suggestion

if TYPE_CHECKING:
    from nanovllm.entrypoints.bench.datasets import SampleRequest
    from nanovllm.entrypoints.bench.serve import Target
    from nanovllm.entrypoints.bench.serve_report import ServingReport

ERRORS_SHOWN = 10
EXIT_ALL_FAILED = 1


def run_serve(arguments: argparse.Namespace) -> int:
    """Measure, print, and write the file."""
    from nanovllm.entrypoints.serve.listener import run_loop

    options = _Options(arguments)  # whatever can be refused is refused before anything is sent
    report, model, tokenizer = run_loop(_measure(options))
    print(report)
    for number, result in enumerate(report.failed[:ERRORS_SHOWN]):
        print(f"Error {number}: {result.error}", file=sys.stderr)
    if options.file_wanted:
        options.write(report, model, tokenizer)
    return 0 if report.completed else EXIT_ALL_FAILED


class _Options:
    """The options, checked.

    Raises:
        UsageError: some do not make sense.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.given = given = arguments
        self.url: str = given.base_url or f"http://{given.host}:{given.port}"
        self.headers = _pairs("--header", given.header)
        if (key := os.environ.get("OPENAI_API_KEY")) and "authorization" not in map(str.lower, self.headers):
            self.headers["Authorization"] = f"Bearer {key}"
        self.dataset = given.dataset_name or ("random" if given.dataset_path is None else "sharegpt")
        if (self.dataset == "sharegpt") != (given.dataset_path is not None):
            raise UsageError("--dataset-name sharegpt needs --dataset-path FILE, and random takes none")
        self.generates = given.backend != "openai-embeddings"
        self.metrics = _names(given.percentile_metrics or ("ttft,tpot,itl" if self.generates else "e2el"))
        self.percentiles = _percentiles(given.metric_percentiles)
        self.goodput = None if given.goodput is None else _goodput(given.goodput)
        self.metadata = _pairs("--metadata", given.metadata)
        self.file_wanted: bool = given.save_result or given.append_result
        self.folder = Path(given.result_dir)
        ramp = (given.ramp_up_start_rps, given.ramp_up_end_rps)
        if (given.ramp_up_strategy is None) != (None in ramp) or ramp.count(None) == 1:
            raise UsageError("--ramp-up-strategy, --ramp-up-start-rps and --ramp-up-end-rps go together")
        if given.ramp_up_strategy is not None and not math.isinf(given.request_rate):
            raise UsageError("--request-rate and --ramp-up-strategy contradict each other")
        self.extra_body = dict(given.extra_body)
        for name in SAMPLING:
            if getattr(given, name) is not None:
                self.extra_body.setdefault(name, getattr(given, name))
        if given.ignore_eos:
            self.extra_body.setdefault("ignore_eos", True)
        if given.logprobs is not None:
            chat = given.backend == "openai-chat"
            self.extra_body |= (
                {"logprobs": True, "top_logprobs": given.logprobs} if chat else {"logprobs": given.logprobs}
            )
        if given.chat_template_kwargs:
            if given.backend != "openai-chat":
                raise UsageError(f"--chat-template-kwargs is for --backend openai-chat, not {given.backend}")
            self.extra_body.setdefault("chat_template_kwargs", given.chat_template_kwargs)
        self.request_id_prefix: str = given.request_id_prefix or f"bench-{uuid.uuid4().hex[:8]}-"
        self.times = self._times()
        self._target("").client()  # refuses a URL that is none

    def _times(self) -> list[float]:
        from nanovllm.entrypoints.bench.arrivals import RampUp, arrival_times

        given = self.given
        ramp_up = None
        if given.ramp_up_strategy is not None:
            ramp_up = RampUp(given.ramp_up_strategy, given.ramp_up_start_rps, given.ramp_up_end_rps)
        return arrival_times(
            given.num_prompts, given.request_rate, burstiness=given.burstiness, ramp_up=ramp_up, seed=given.seed
        )

    def _target(self, model: str) -> Target:
        from nanovllm.entrypoints.bench.serve import Target

        given = self.given
        try:
            target = Target(
                self.url,
                model,
                backend=given.backend,
                endpoint=given.endpoint,
                headers=self.headers,
                extra_body=self.extra_body,
                request_id_prefix=self.request_id_prefix,
                verify=not given.insecure,
            )
            target.client()
        except ValueError as error:
            raise UsageError(f"--base-url: {error}") from None
        return target

    async def target(self) -> tuple[Target, str, str]:
        """What to measure, and the names of its model and tokenizer."""
        from nanovllm.entrypoints.bench.serve import first_model

        model, root = self.given.model, self.given.model
        if model is None:
            try:
                model, root = await first_model(self._target(""))
            except (OSError, ValueError) as error:
                raise UsageError(f"{self.url} does not say which models it has ({error}); is it running?") from None
        return self._target(self.given.served_model_name or model), model, self.given.tokenizer or root

    def requests(self, tokenizer: str) -> list[SampleRequest]:
        """What to send."""
        from nanovllm.engine.tokenizer import Tokenizer
        from nanovllm.entrypoints.bench.datasets import as_text, random_requests, sharegpt_requests, text_token_ids
        from nanovllm.errors import ModelError
        from nanovllm.hub import resolve_model_path

        given = self.given
        try:
            folder = resolve_model_path(tokenizer, weights=False)
        except ModelError as error:
            raise UsageError(f"no tokenizer: {error}; --tokenizer names one") from None
        loaded = Tokenizer.load(folder, mode=given.tokenizer_mode, trust_remote_code=given.trust_remote_code)
        if self.dataset == "sharegpt":
            length = given.random_output_len
            return sharegpt_requests(given.dataset_path, loaded, given.num_prompts, length, seed=given.seed)
        ids = text_token_ids(loaded)
        requests = random_requests(
            ids,
            given.num_prompts,
            given.random_input_len,
            given.random_output_len or DEFAULT_OUTPUT_LEN,
            prefix_len=given.random_prefix_len,
            range_ratio=given.random_range_ratio,
            seed=given.seed,
        )
        return as_text(requests, loaded, ids, given.seed)

    def write(self, report: ServingReport, model: str, tokenizer: str) -> None:
        """Write the JSON file."""
        given = self.given
        rate = "inf" if math.isinf(given.request_rate) else given.request_rate
        now = time.strftime("%Y%m%d-%H%M%S")
        label = given.label or given.backend
        about: dict[str, Any] = {
            "date": now,
            "endpoint_type": given.backend,
            "backend": given.backend,
            "label": given.label,
            "model_id": model,
            "tokenizer_id": tokenizer,
            "num_prompts": given.num_prompts,
            **self.metadata,
            "request_rate": rate,
            "burstiness": given.burstiness,
            "max_concurrency": given.max_concurrency,
        }
        speed = f"{rate}qps"
        if given.ramp_up_strategy is not None:
            keys = ("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps")
            about |= {key: getattr(given, key) for key in keys}
            speed = f"ramp-up-{given.ramp_up_strategy}-{given.ramp_up_start_rps:g}qps-{given.ramp_up_end_rps:g}qps"
        concurrency = "" if given.max_concurrency is None else f"-concurrency{given.max_concurrency}"
        name = given.result_filename or f"{label}-{speed}{concurrency}-{Path(model).name}-{now}.json"
        file = self.folder / name
        text = json.dumps({**about, **report.to_json(given.save_detailed)})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if given.append_result and file.exists() and file.stat().st_size:
                text = "\n" + text
            with file.open("a" if given.append_result else "w", encoding="utf-8") as out:
                out.write(text)
        except OSError as error:
            raise UsageError(f"{file}: {error.strerror}") from None
        print(f"written: {file}", file=sys.stderr)


async def _measure(options: _Options) -> tuple[ServingReport, str, str]:
    from nanovllm.entrypoints.bench.serve import measure_serving, wait_until_ready
    from nanovllm.entrypoints.bench.serve_report import ServingReport

    given = options.given
    target, model, tokenizer = await options.target()
    requests = await asyncio.to_thread(options.requests, tokenizer)
    if given.temperature is None and options.generates and "temperature" not in options.extra_body:
        print(
            "WARNING: no temperature is sent, so the server's default applies, which may differ from server to server. "
            "--temperature 0 makes the answers greedy.",
            file=sys.stderr,
        )
    if given.ready_check_timeout_sec > 0:
        print("Waiting for a first answer...")
        error = await wait_until_ready(target, requests[0], given.ready_check_timeout_sec)
        if error is not None:
            raise UsageError(f"no answer from {options.url} in {given.ready_check_timeout_sec:g} s: {error}")
    if given.num_warmups:
        print(f"Warming up with {given.num_warmups} requests...")
        chosen = [requests[index % len(requests)] for index in range(given.num_warmups)]
        await measure_serving(
            target, chosen, [0.0] * len(chosen), max_concurrency=given.max_concurrency, use_tqdm=False
        )
    if given.ramp_up_strategy is not None:
        print(f"Traffic ramp-up strategy: {given.ramp_up_strategy}.")
    else:
        print(f"Traffic request rate: {given.request_rate}")
    print(f"Burstiness factor: {given.burstiness}" + (" (Poisson process)" if given.burstiness == 1.0 else ""))
    print(f"Maximum request concurrency: {given.max_concurrency}", flush=True)
    results, duration = await measure_serving(
        target,
        requests,
        options.times,
        max_concurrency=given.max_concurrency,
        use_tqdm=not given.disable_tqdm and sys.stderr.isatty(),
    )
    report = ServingReport(
        results,
        duration,
        options.metrics,
        options.percentiles,
        options.goodput,
        options.generates,
        given.request_rate,
        given.max_concurrency,
    )
    return report, model, tokenizer


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METRICS:
            raise UsageError(f"--percentile-metrics: there is no metric {name!r}{suggestion(name, METRICS)}; "
                             f"metrics are {','.join(METRICS)}")  # fmt: skip
    return names


def _percentiles(text: str) -> list[float]:
    try:
        values = [float(number) for number in text.split(",")]
    except ValueError:
        raise UsageError(f"--metric-percentiles {text}: not numbers such as 25,50,99") from None
    if not all(0 <= value <= 100 for value in values):
        raise UsageError(f"--metric-percentiles {text}: a percentage is from 0 to 100")
    return values


def _goodput(words: Sequence[str]) -> dict[str, float]:
    limits = {}
    for word in words:
        metric, colon, limit = word.partition(":")
        if metric not in GOODPUT_METRICS or not colon:
            raise UsageError(f"--goodput {word}: give {', '.join(f'{name}:MS' for name in GOODPUT_METRICS)}")
        try:
            limits[metric] = float(limit)
        except ValueError:
            raise UsageError(f"--goodput {word}: {limit!r} is no number of milliseconds") from None
        if not limits[metric] >= 0:
            raise UsageError(f"--goodput {word}: a limit is not negative")
    return limits


def _pairs(option: str, words: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{option} {word}: give KEY=VALUE")
        pairs[key.strip()] = value.strip()
    return pairs
