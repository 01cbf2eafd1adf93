"""The load generator of `load`, for a minute: floods, stalls and kills, with the invariant checker on."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from load import scenarios
from load.engine import EngineSettings
from load.server import LoadServer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts files and threads in /proc")


@pytest.fixture(scope="module")
def server() -> Iterator[LoadServer]:
    """Some of its engine's steps fail, at any time; nobody must notice."""
    settings = EngineSettings(seconds=0.01, num_blocks=600, fault_rate=0.02)
    options = ("--max-num-seqs", "48", "--max-num-queued-reqs", "300", "--client-timeout", "5")
    with LoadServer(*options, engine=settings) as made:
        yield made
        assert made.stop() == 0
        log = made.log
        assert "InvariantError" not in log, log[-3000:]
        assert "A request failed." not in log and "Exception in ASGI" not in log, log[-3000:]


def test_many_streams_are_held_at_once(server: LoadServer):
    figures = scenarios.run(scenarios.hold(server, 200, 40, scrapes=3))
    assert figures["front_files_per_connection"] == 1 and figures["live_at_the_last_scrape"] > 100


def test_everything_at_random_leaves_nothing_behind(server: LoadServer):
    figures = scenarios.run(scenarios.soak(server, seconds=5.0, clients=24, warm_up=3.0))
    assert figures["faults"]["step_failed"] > 0 and figures["faults"]["out_of_memory"] > 0
    assert len([name for name in figures["requests"] if name.startswith("malformed")]) > 8
    assert all(figures[name]["rss_growth"] < 0.1 for name in ("front", "engine")), figures


def test_ten_times_the_load_loses_no_accepted_request(server: LoadServer):
    figures = scenarios.run(scenarios.overload(server, seconds=3.0, factor=10.0, max_tokens=24, clients=96))
    assert figures["answers"][200] > 0 and figures["answers"][503] > 0 and figures["lost"] == 0


def test_a_flood_is_answered_or_refused_to_the_last_request(server: LoadServer):
    figures = scenarios.run(scenarios.flood(server, 1500))
    assert figures["answers"].get(503, 0) > 0
    assert figures["answers"][200] + figures["answers"][503] == 1500 and figures["reset"] == 0


def test_a_killed_engine_is_replaced_under_load(server: LoadServer):
    scenarios.run(scenarios.kill(server, 60))
