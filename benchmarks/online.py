"""The online benchmark: a server with Qwen3-0.6B's shape, measured by ``nanovllm bench serve``, beside vLLM's.

    python benchmarks/online.py                              # our server
    python benchmarks/online.py --vllm vllm/bin/python       # and vLLM's, from an environment of its own

256 random tokens in, 128 out, as streams from ``/v1/completions``: 10 requests one after the other, then 32 of which 8
are under way at any time. Weights are random (``--load-format dummy``), the vocabulary has its real size. Each server
runs alone; both are measured by the same client, which shares the machine with them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from report import RESULTS, print_table, write_results
from workloads import SHAPES

from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.entrypoints.bench.datasets import as_text, random_requests, text_token_ids
from nanovllm.entrypoints.bench.serve import Target, measure_serving
from nanovllm.entrypoints.bench.serve_report import ServingReport
from nanovllm.entrypoints.serve.listener import run_loop

ROOT = Path(__file__).parents[1]
START_LIMIT = 600.0  # seconds; vLLM compiles
INPUT_LEN, OUTPUT_LEN = 256, 128
LOADS = {1: 10, 8: 32}  # concurrency -> number of requests
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def make_model(folder: Path, shape: dict[str, Any]) -> None:
    """A checkpoint without weights, and a tokenizer with one word per token: random tokens are text and back again."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    words, room = ["Ġ"], shape["vocab_size"] - len(tokens) - len(SPECIAL)
    while len(merges) < room:  # words of one letter, of two, ...
        longer = [(word, letter) for word in words for letter in LETTERS][: room - len(merges)]
        merges += longer
        words = [word + letter for word, letter in longer]
    vocabulary = {token: index for index, token in enumerate([*tokens, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = tokenizer.token_to_id(SPECIAL[2])
    config = shape | {"bos_token_id": tokenizer.token_to_id(SPECIAL[0]), "eos_token_id": eos}
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}
    for name, content in (("config.json", config), ("tokenizer_config.json", names)):
        (folder / name).write_text(json.dumps(content))


class Server:
    """A server in a process of its own; its output is in a file until it is ready."""

    def __init__(self, command: list[str], port: int, environment: dict[str, str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.url = f"http://127.0.0.1:{port}"
        started = time.perf_counter()
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=environment)
        while not self._answers():
            if self._process.poll() is not None or time.perf_counter() - started > START_LIMIT:
                self.stop()
                self._log.seek(0)
                raise SystemExit(f"{' '.join(command)} does not start:\n{self._log.read()[-5000:]}")
            time.sleep(0.02)
        self.ready_after = time.perf_counter() - started

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/v1/models", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        """End it; what it has started ends with it."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start(name: str, model: Path, options: argparse.Namespace) -> Server:
    """Our server, or vLLM's."""
    port = _free_port()
    common = ["serve", str(model), "--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", "2048"]
    common += ["--max-num-seqs", "64", "--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)]
    if name == "nanovllm":
        command = [sys.executable, "-m", "nanovllm", *common]
        return Server(command, port, {**os.environ, "PYTHONPATH": str(ROOT)})
    command = [options.vllm, str(Path(__file__).with_name("vllm_command.py")), *common, *options.vllm_options.split()]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return Server(command, port, {**environment, "VLLM_CPU_KVCACHE_SPACE": "4"})


def measure(url: str, model: Path, concurrency: int, scale: float, seed: int) -> dict[str, Any]:
    """Figures of one load, vLLM's keys."""
    tokenizer = Tokenizer.load(model)
    ids = text_token_ids(tokenizer)
    count = max(concurrency, round(LOADS[concurrency] * scale))
    lengths = max(1, round(INPUT_LEN * scale)), max(2, round(OUTPUT_LEN * scale))
    requests = as_text(random_requests(ids, count + 1, *lengths, seed=seed), tokenizer, ids)
    target = Target(url, "model", extra_body={"ignore_eos": True})
    run_loop(measure_serving(target, requests[:1], [0.0], use_tqdm=False))  # not counted
    results, duration = run_loop(
        measure_serving(target, requests[1:], [0.0] * count, max_concurrency=concurrency, use_tqdm=False)
    )
    report = ServingReport(results, duration, ("ttft", "tpot", "itl", "e2el"), max_concurrency=concurrency)
    print(report, flush=True)
    if report.failed:
        raise SystemExit(f"{len(report.failed)} requests failed: {report.failed[0].error}")
    assert [result.output_len for result in results] == [lengths[1]] * count
    figures = report.to_json(detailed=False)
    return {key: value for key, value in figures.items() if not isinstance(value, list)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="PYTHON", help="Python of an environment that has vLLM")
    parser.add_argument("--vllm-options", default="", metavar="WORDS", help="such as --enforce-eager")
    parser.add_argument("--rounds", type=int, default=1, help="of both servers, in turn")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--scale", type=float, default=1.0, help="of lengths and number of requests")
    parser.add_argument("--output", type=Path, default=RESULTS / f"online-{time.strftime('%Y-%m-%d')}.json")
    options = parser.parse_args()

    names = ["nanovllm", *(["vllm"] if options.vllm else [])]
    ready: dict[str, list[float]] = {name: [] for name in names}
    figures: dict[str, dict[int, list[dict[str, Any]]]] = {name: {load: [] for load in LOADS} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), SHAPES[options.shape])
        for number in range(options.rounds):
            for name in names:
                server = start(name, Path(folder), options)
                try:
                    ready[name].append(server.ready_after)
                    for load in LOADS:
                        print(f"\n{name}, concurrency {load}")
                        figures[name][load].append(measure(server.url, Path(folder), load, options.scale, number))
                finally:
                    server.stop()
    rows = []
    for load in LOADS:
        for name in names:
            keys = ("output_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "median_itl_ms", "p99_itl_ms")
            values = [statistics.median(each[key] for each in figures[name][load]) for key in keys]
            rows.append([name, load, statistics.median(ready[name]), *values])
    print()
    head = ["server", "concurrency", "ready s", "output tok/s", "TTFT ms", "p99", "TPOT ms", "ITL median", "p99"]
    print_table(head, rows)
    write_results(options.output, shape=options.shape, scale=options.scale, ready_after=ready, figures=figures)


if __name__ == "__main__":
    main()
