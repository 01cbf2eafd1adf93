"""``nanovllm bench``: what is measured, the lines that are printed, and the JSON that is written."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_checkpoint
from tiny_tokenizers import qwen

import nanovllm
from nanovllm import LLM, AsyncLLM, EngineArgs
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.entrypoints.bench.datasets import SampleRequest, plain_token_ids, random_requests, sharegpt_requests
from nanovllm.entrypoints.bench.latency import LatencyResult, measure_latency
from nanovllm.entrypoints.bench.throughput import ThroughputResult, measure_async_throughput, measure_throughput
from nanovllm.entrypoints.cli.main import main, make_parser
from nanovllm.errors import ParameterError

ROOT = Path(nanovllm.__file__).parents[1]
VOCAB_SIZE, IM_END = 337, 332  # of tiny_tokenizers.qwen
NUMBER = r"\d+\.\d{2}"
SETTINGS: dict[str, Any] = {"max_model_len": 64, "num_gpu_blocks_override": 40, "enable_prefix_caching": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, "qwen3", vocab_size=VOCAB_SIZE + 7, eos_token_id=IM_END)  # a padded vocabulary
    return qwen(folder)


def bench(kind: str, model: Path, *options: str | Path) -> list[str]:
    return ["bench", kind, "--model", str(model), "--kv-cache-memory-bytes", "16M", *map(str, options)]


# -- the command ------------------------------------------------------------------------------------------------------


def test_throughput_prints_vllms_lines_and_keys(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    file = tmp_path / "throughput.json"
    lengths = ["--num-prompts", "7", "--random-input-len", "12", "--output-len", "5", "--prefix-len", "3"]
    options = [*lengths, "--load-format", "dummy", "--skip-tokenizer-init", "--backend", "vllm", "--n", "2"]
    assert main(bench("throughput", model, *options, "--output-json", file)) == 0
    assert re.fullmatch(
        rf"Throughput: {NUMBER} requests/s, {NUMBER} total tokens/s, {NUMBER} output tokens/s\n"
        r"Total num prompt tokens:  105\n"
        r"Total num output tokens:  70\n",
        capfd.readouterr().out,
    )
    written = json.loads(file.read_text())
    assert list(written) == [
        "model_id", "elapsed_time", "num_requests", "total_num_tokens", "requests_per_second", "tokens_per_second"
    ]  # fmt: skip
    assert written["model_id"] == str(model)
    assert (written["num_requests"], written["total_num_tokens"]) == (7, 175)
    assert written["requests_per_second"] == 7 / written["elapsed_time"]
    assert written["tokens_per_second"] == 175 / written["elapsed_time"]


def test_latency_prints_vllms_lines_and_keys(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    file = tmp_path / "latency.json"
    lengths = ["--input-len", "9", "--output-len", "4", "--batch-size", "3", "--num-iters-warmup", "1"]
    assert main(bench("latency", model, *lengths, "--num-iters", "5", "--output-json", file)) == 0
    output = capfd.readouterr().out
    written = json.loads(file.read_text())
    assert list(written) == ["model_id", "avg_latency", "latencies", "percentiles"]
    assert len(written["latencies"]) == 5
    assert written["avg_latency"] == pytest.approx(sum(written["latencies"]) / 5)
    assert list(written["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    lines = [f"Avg latency: {written['avg_latency']} seconds"]
    lines += [f"{percent}% percentile latency: {value} seconds" for percent, value in written["percentiles"].items()]
    assert output == "\n".join(lines) + "\n"


def test_progress_bars_are_on_standard_error_of_a_terminal_only(model: Path):
    from pseudo_terminal import PseudoTerminal

    options = ["--num-prompts", "2", "--input-len", "4", "--output-len", "2", "--async-engine", "--num-warmups", "1"]
    command = [sys.executable, "-m", "nanovllm", *bench("throughput", model, *options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == "" and done.stdout.count("\n") == 3
    with PseudoTerminal(command, environment, stderr_too=True) as terminal:
        assert terminal.wait() == 0
        assert b"Processed prompts: 100%" in terminal.screen and b"Total num output tokens:  4" in terminal.screen


def test_latency_is_measured_without_the_prefix_cache_unless_asked():
    parser = make_parser(["bench"])
    assert parser.parse_args(["bench", "latency"]).enable_prefix_caching is False
    assert parser.parse_args(["bench", "latency", "--enable-prefix-caching"]).enable_prefix_caching is True
    assert not hasattr(parser.parse_args(["bench", "throughput"]), "enable_prefix_caching")


def test_options_and_their_defaults_are_vllms():
    parser = make_parser(["bench"])
    throughput = vars(parser.parse_args(["bench", "throughput"]))
    assert (throughput["num_prompts"], throughput["n"], throughput["num_warmups"]) == (1000, 1, 0)
    latency = vars(parser.parse_args(["bench", "latency"]))
    names = ("input_len", "output_len", "batch_size", "n", "num_iters_warmup", "num_iters", "use_beam_search")
    assert [latency[name] for name in names] == [32, 128, 8, 1, 10, 30, False]


def test_the_kinds_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["bench"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("usage: nanovllm bench") and "throughput" in output and "latency" in output


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["throughput", "--backend", "hf"], "--backend: invalid choice: 'hf' (choose from"),
        (["throughput", "--backend", "mii"], "--backend: invalid choice: 'mii'"),
        (["serving"], "invalid choice: 'serving'"),
        (["throughput", "--dataset-name", "sonnet"], "--dataset-name: invalid choice: 'sonnet'"),
        (["throughput", "--dataset-name", "sharegpt"], "needs --dataset-path FILE"),
        (["throughput", "--dataset-name", "random", "--dataset-path", "x.json"], "random takes none"),
        (["throughput", "--input-len", "5", "--random-input-len", "6"], "contradict each other"),
        (["throughput", "--num-prompts", "0"], "argument --num-prompts: 0 is less than 1"),
        (["latency", "--num-iters", "many"], "'many' is not a whole number"),
        (["latency", "--output-json", "no/such/folder.json"], "there is no folder no/such"),
        (["latency", "--num_itres", "3"], "there is no option --num-itres; did you mean --num-iters?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_answered_in_one_line(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("nanovllm: error: ") and part in captured.err


def test_requests_that_do_not_fit_are_refused(model: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--max-model-len", "100", "--num-prompts", "1", "--input-len", "97", "--output-len", "4"]
    assert main(bench("throughput", model, *options)) == 2
    assert "the longest request needs 101 tokens" in capsys.readouterr().err


# -- what is measured --------------------------------------------------------------------------------------------------


def test_requests_generate_exactly_what_was_asked(model: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    generate = LLM.generate

    def spy(self: LLM, prompts: Any, params: Any, **options: Any) -> Any:
        seen.append((prompts, params))
        return generate(self, prompts, params, **options)

    monkeypatch.setattr(LLM, "generate", spy)
    with LLM(str(model), **SETTINGS) as llm:
        requests = random_requests(plain_token_ids(llm.llm_engine.model_config, llm.get_tokenizer()), 5, 20, 6,
                                   range_ratio=0.5)  # fmt: skip
        result = measure_throughput(llm, requests, n=2, detokenize=False, num_warmups=2, use_tqdm=False)
        assert llm.generate([requests[0].prompt], seen[1][1][0], use_tqdm=False)[0].outputs[0].text == ""
    (warmup, _), (prompts, params), _ = seen
    assert warmup == prompts[:2] and prompts == [request.prompt for request in requests]
    assert all((p.temperature, p.ignore_eos, p.n, p.detokenize) == (1.0, True, 2, False) for p in params)
    assert [p.max_tokens for p in params] == [request.expected_output_len for request in requests]
    assert result.num_requests == 5
    assert result.num_prompt_tokens == sum(request.prompt_len for request in requests)
    assert result.num_output_tokens == 2 * sum(request.expected_output_len for request in requests)


def test_streams_are_counted_like_a_batch(model: Path):
    engine = AsyncLLM(EngineArgs(model=str(model), **SETTINGS).build())
    try:
        requests = random_requests(range(300), 5, 20, 6)
        measured = measure_async_throughput(engine, requests, n=2, num_warmups=1, use_tqdm=False)
        result = asyncio.run(measured)
    finally:
        engine.shutdown()
    assert (result.num_requests, result.num_prompt_tokens, result.num_output_tokens) == (5, 100, 60)
    assert result.elapsed_time > 0


def test_warmup_batches_are_not_counted(model: Path, monkeypatch: pytest.MonkeyPatch):
    clock = itertools.count()
    monkeypatch.setattr("nanovllm.entrypoints.bench.latency.time.perf_counter", lambda: next(clock) ** 2)
    with LLM(str(model), **{**SETTINGS, "enable_prefix_caching": False}) as llm:
        batch = random_requests(range(300), 2, 8, 3)
        monkeypatch.setattr(llm, "generate", lambda *_, **__: None)
        assert measure_latency(llm, batch, num_warmups=2, num_iterations=3, use_tqdm=False).latencies == [9, 13, 17]
    # A batch takes from one reading of the clock to the next: 4² to 5², 6² to 7², 8² to 9².


def test_beam_search_is_measured_if_asked_for(model: Path, monkeypatch: pytest.MonkeyPatch):
    with LLM(str(model), **SETTINGS) as llm:
        results = []
        search = llm.beam_search
        monkeypatch.setattr(llm, "beam_search", lambda *args: results.append(search(*args)))
        batch = random_requests(range(300), 2, 8, 3)
        measure_latency(llm, batch, n=2, use_beam_search=True, num_warmups=0, num_iterations=1, use_tqdm=False)
    assert [[len(sequence.tokens) for sequence in output.sequences] for output in results[0]] == [[11, 11]] * 2


def test_percentiles_are_those_of_numpy():
    import numpy as np

    latencies = [0.5, 0.1, 0.9, 0.25, 0.3, 0.7, 0.2]
    percentiles = LatencyResult(latencies).percentiles
    assert list(percentiles.values()) == pytest.approx(np.percentile(latencies, list(percentiles)).tolist())
    assert set(LatencyResult([0.5]).percentiles.values()) == {0.5}


def test_speeds_are_rounded_in_the_text_only():
    result = ThroughputResult(0.3, 1, 10, 20)
    assert str(result) == (
        "Throughput: 3.33 requests/s, 100.00 total tokens/s, 66.67 output tokens/s\n"
        "Total num prompt tokens:  10\nTotal num output tokens:  20"
    )
    assert result.to_json("m")["requests_per_second"] == 1 / 0.3


# -- requests ----------------------------------------------------------------------------------------------------------


def ids_of(request: SampleRequest) -> list[int]:
    return request.prompt["prompt_token_ids"]


def test_random_prompts_are_seeded_and_share_their_prefix():
    requests = random_requests(range(10, 50), 20, 30, 8, prefix_len=6, seed=3)
    assert requests == random_requests(range(10, 50), 20, 30, 8, prefix_len=6, seed=3)
    assert requests != random_requests(range(10, 50), 20, 30, 8, prefix_len=6, seed=4)
    assert {len(ids_of(request)) for request in requests} == {36} == {request.prompt_len for request in requests}
    assert len({tuple(ids_of(request)[:6]) for request in requests}) == 1
    assert len({tuple(ids_of(request)[6:]) for request in requests}) == 20
    assert {token_id for request in requests for token_id in ids_of(request)} == set(range(10, 50))
    assert {request.expected_output_len for request in requests} == {8}


def test_random_lengths_spread_as_asked():
    requests = random_requests(range(9), 400, 20, 10, range_ratio=0.25)
    assert {request.prompt_len for request in requests} == set(range(15, 26))
    assert {request.expected_output_len for request in requests} == set(range(8, 13))
    for bad in ({"input_len": 0}, {"output_len": 0}, {"prefix_len": -1}, {"range_ratio": 1.0}):
        with pytest.raises(ParameterError, match=next(iter(bad))):
            random_requests(range(9), **{"num_requests": 1, "input_len": 5, "output_len": 5, **bad})


def test_tokens_are_drawn_from_text_only(model: Path):
    config = EngineArgs(model=str(model)).build().model
    tokenizer = Tokenizer.load(model)
    ids = set(plain_token_ids(config, tokenizer))
    assert ids == set(range(len(tokenizer))) - set(tokenizer.all_special_ids) - {IM_END}
    assert len(tokenizer) < config.vocab_size
    without = set(plain_token_ids(config, None))
    assert IM_END not in without and config.hf_config["bos_token_id"] not in without
    assert max(without) == config.vocab_size - 1


def test_sharegpt_questions_of_a_fitting_length_are_taken(model: Path, tmp_path: Path):
    def conversation(*values: str) -> dict[str, Any]:
        return {"id": "x", "conversations": [{"from": "human", "value": value} for value in values]}

    question, answer = "What about the lazy dog?", "The dog was not amused."
    file = tmp_path / "sharegpt.json"
    bad = [conversation("x", answer), conversation("dog " * 3000, answer), conversation(question), {"id": "no turns"}]
    bad += [conversation("Too long to answer?", "dog " * 3000), conversation("And a short answer?", "a")]
    file.write_text(json.dumps([*bad, conversation(question, answer, "more")]))
    tokenizer = Tokenizer.load(model)
    requests = sharegpt_requests(str(file), tokenizer, 3)
    expected = SampleRequest(question, len(tokenizer.encode(question)), len(tokenizer.encode(answer)))
    assert requests == [expected] * 3  # too few, so repeated
    requests = sharegpt_requests(str(file), tokenizer, 9, output_len=2)
    assert {request.expected_output_len for request in requests} == {2}
    assert {request.prompt for request in requests} == {question, "Too long to answer?", "And a short answer?"}


def test_an_unusable_sharegpt_file_is_answered(model: Path, tmp_path: Path):
    tokenizer = Tokenizer.load(model)
    file = tmp_path / "file.json"
    with pytest.raises(ParameterError, match="cannot be read: No such file"):
        sharegpt_requests(str(file), tokenizer, 1)
    for text in ("{", "5", "[5]", '[{"conversations": [1, 2]}]'):
        file.write_text(text)
        with pytest.raises(ParameterError, match="not a ShareGPT file"):
            sharegpt_requests(str(file), tokenizer, 1)
    file.write_text("[]")
    with pytest.raises(ParameterError, match="no conversation"):
        sharegpt_requests(str(file), tokenizer, 1)
    with pytest.raises(ParameterError, match="needs a tokenizer"):
        sharegpt_requests(str(file), None, 1)


# -- start-up ---------------------------------------------------------------------------------------------------------


def test_startup_prints_vllms_lines_and_keys(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    file = tmp_path / "startup.json"
    counts = ["--num-iters-cold", "1", "--num-iters-warmup", "0", "--num-iters-warm", "2"]
    assert main(bench("startup", model, *counts, "--output-json", file)) == 0
    seconds = r"\d+\.\d{2} seconds\n"
    percentiles = "".join(rf"  {percentage}%: {seconds}" for percentage in (10, 25, 50, 75, 90, 99))
    phase = (
        rf"STARTUP:\nAvg startup time: {seconds}Avg compilation time: 0\.00 seconds\n"
        rf"Startup time percentiles:\n{percentiles}Compilation time percentiles:\n(?:  \d\d%: 0\.00 seconds\n){{6}}"
    )
    title = "=" * 60 + "\nSTARTUP TIME BENCHMARK RESULTS\n" + "=" * 60 + "\n"
    output = capfd.readouterr().out
    assert re.fullmatch(rf"{title}\nCOLD {phase}\nWARM {phase}={{60}}\n", output), output
    written = json.loads(file.read_text())
    assert list(written) == [
        f"{start}{phase}_{kind}{end}"
        for phase in ("cold", "warm")
        for kind in ("startup", "compilation")
        for start, end in (("avg_", "_time"), ("", "_times"), ("", "_percentiles"))
    ]
    assert len(written["cold_startup_times"]) == 1 and len(written["warm_startup_times"]) == 2
    assert written["avg_warm_startup_time"] == pytest.approx(sum(written["warm_startup_times"]) / 2)
    assert list(written["cold_startup_percentiles"]) == ["10", "25", "50", "75", "90", "99"]


def test_an_engine_that_does_not_start_is_one_line(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    for file in broken.glob("*.safetensors"):
        file.write_bytes(b"no weights")
    assert main(bench("startup", broken)) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("nanovllm: error: ") and errors.count("\n") == 1 and str(broken) in errors
