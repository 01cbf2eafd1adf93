"""What ``bench serve`` prints and writes, made of requests whose times are known."""

from __future__ import annotations

from typing import Any

import pytest

from nanovllm.entrypoints.bench.backends import RequestResult
from nanovllm.entrypoints.bench.serve_report import ServingReport


def report(**settings: Any) -> ServingReport:
    """Two requests of known times, and one that failed."""
    results = [
        RequestResult(True, "", 10.0, 0.0, 1.1, 0.1, [0.25] * 4, 7, 5, "abcde"),
        RequestResult(True, "", 10.5, 0.2, 0.9, 0.3, [0.3, 0.3], 9, 7, "xyz"),
        RequestResult(False, "HTTP 500: no", 11.0, 0.0, 0.0, 0.0, [], 3),
    ]
    return ServingReport(results, 2.0, **settings)


TABLE = """\
============ Serving Benchmark Result ============
Successful requests:                     2         \n\
Failed requests:                         1         \n\
Maximum request concurrency:             4         \n\
Request rate configured (RPS):           1.50      \n\
Benchmark duration (s):                  2.00      \n\
Total input tokens:                      16        \n\
Total generated tokens:                  12        \n\
Request throughput (req/s):              1.00      \n\
Request goodput (req/s):                 0.50      \n\
Output token throughput (tok/s):         6.00      \n\
Peak output token throughput (tok/s):    6.33      \n\
Peak concurrent requests:                2.00      \n\
Total token throughput (tok/s):          14.00     \n\
---------------Time to First Token----------------
Mean TTFT (ms):                          200.00    \n\
Median TTFT (ms):                        200.00    \n\
P50 TTFT (ms):                           200.00    \n\
P99.9 TTFT (ms):                         299.80    \n\
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          175.00    \n\
Median TPOT (ms):                        175.00    \n\
P50 TPOT (ms):                           175.00    \n\
P99.9 TPOT (ms):                         249.85    \n\
---------------Inter-token Latency----------------
Mean ITL (ms):                           266.67    \n\
Median ITL (ms):                         250.00    \n\
P50 ITL (ms):                            250.00    \n\
P99.9 ITL (ms):                          300.00    \n\
----------------End-to-end Latency----------------
Mean E2EL (ms):                          1000.00   \n\
Median E2EL (ms):                        1000.00   \n\
P50 E2EL (ms):                           1000.00   \n\
P99.9 E2EL (ms):                         1099.80   \n\
=================================================="""


def test_the_table_is_vllms_to_the_letter():
    metrics = ("e2el", "ttft", "tpot", "itl")
    made = report(
        metrics=metrics, percentiles=(50.0, 99.9), goodput={"ttft": 250.0, "e2el": 1100.0}, request_rate=1.5,
        max_concurrency=4,
    )  # fmt: skip
    assert str(made) == TABLE


def test_lines_that_do_not_apply_are_left_out():
    text = str(report())
    for absent in ("concurrency:", "configured", "goodput", "E2EL"):
        assert absent not in text
    text = str(report(generates=False, metrics=("ttft", "e2el")))
    assert "generated" not in text
    assert "TTFT" not in text
    assert "P99 E2EL (ms):" in text


def test_a_run_without_an_answer_has_figures_too():
    text = str(ServingReport([RequestResult(error="x")], 1.0))
    assert "Failed requests:                         1" in text
    assert "Mean TTFT (ms):                          0.00" in text


def test_json_keys_are_vllms():
    written = report(goodput={"tpot": 260.0}).to_json(detailed=True)
    assert list(written) == [
        "duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
        "request_goodput", "output_throughput", "total_token_throughput", "input_lens", "output_lens", "ttfts", "itls",
        "latencies", "start_times", "queue_times", "generated_texts", "errors", "max_output_tokens_per_s",
        "max_concurrent_requests", "rtfx",
        *(f"{kind}_{metric}_ms" for metric in ("ttft", "tpot", "itl") for kind in ("mean", "median", "std", "p99")),
    ]  # fmt: skip
    assert written["request_goodput"] == 1.0
    assert written["errors"] == ["", "", "HTTP 500: no"]
    assert written["output_lens"] == [5, 7, 0]
    assert written["std_ttft_ms"] == pytest.approx(100)
    brief = report().to_json(detailed=False)
    assert "itls" not in brief
    assert brief["latencies"] == [1.1, 0.9, 0.0]
    assert brief["request_goodput"] is None


def test_pieces_count_as_tokens_where_the_server_does_not_count():
    counted = ServingReport([RequestResult(True, "", 0.0, 0.0, 1.0, 0.5, [0.5], 3)], 1.0)
    assert counted.total_output == 2
