"""What a scrape of ``/metrics`` takes while requests are live: as Prometheus sees it, and inside the server.

    python benchmarks/metrics_scrape.py

For every number of live streams, `nanovllm serve` answers so many at once (what does not fit into the batch waits,
and is live as well), their clients read in a process of their own, and this process scrapes. ``inside`` is from the
scrape's head to the answer's last byte, by the server's own ``http_request_duration_seconds``; the rest of the time
passes before the event loop, which writes the streams' tokens, comes to the scrape.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from report import RESULTS, print_table, write_results
from serve_overhead import Server

GOAL_MS = 20.0


async def read_streams(url: str, count: int, max_tokens: int) -> None:
    """Ask for ``count`` streams and read them until this process is ended."""
    where = urlsplit(url)
    body = json.dumps(
        {"prompt": [5, 6, 7], "max_tokens": max_tokens, "ignore_eos": True, "temperature": 1.0, "stream": True}
    ).encode()
    lines = ("POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json")
    request = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body

    async def one() -> None:
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        while True:  # a stream that has ended is followed by another
            writer.write(request)
            while b"data: [DONE]" not in await reader.readuntil(b"\n"):
                pass

    await asyncio.gather(*(one() for _ in range(count)))


class Scraper:
    """One connection, as Prometheus keeps it."""

    def __init__(self, url: str) -> None:
        where = urlsplit(url)
        self._connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=60)

    def scrape(self) -> tuple[float, str]:
        """Milliseconds, and the page."""
        start = time.perf_counter()
        self._connection.request("GET", "/metrics")
        page = self._connection.getresponse().read()
        return 1e3 * (time.perf_counter() - start), page.decode()


def value(page: str, name: str) -> float:
    """The sum of a metric over its labels."""
    return sum(map(float, re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", page, re.MULTILINE)))


def inside(page: str) -> tuple[float, float]:
    """Seconds that scrapes have taken inside the server, and how many there were."""
    total, count = (
        re.search(rf'^http_request_duration_seconds_{part}{{handler="/metrics".*}} (\S+)$', page, re.MULTILINE)
        for part in ("sum", "count")
    )
    return (float(total[1]), float(count[1])) if total and count else (0.0, 0.0)


def measure(server: Server, streams: int, scrapes: int, max_tokens: int) -> dict[str, Any]:
    """Scrape ``scrapes`` times while ``streams`` requests are live."""
    clients = subprocess.Popen(
        [sys.executable, __file__, "--clients", server.url, str(streams), "--max-tokens", str(max_tokens)]
    )
    scraper = Scraper(server.url)
    try:
        deadline = time.monotonic() + 120
        while True:
            _, page = scraper.scrape()
            live = value(page, "vllm:num_requests_running") + value(page, "vllm:num_requests_waiting")
            if live >= streams:
                break
            if time.monotonic() > deadline or clients.poll() is not None:
                raise SystemExit(f"only {live:.0f} of {streams} requests are live")
            time.sleep(0.1)
        seconds, count = inside(page)
        tokens, start = value(page, "vllm:generation_tokens_total"), time.perf_counter()
        times, live_counts = [], []
        for _ in range(scrapes):
            time.sleep(0.05)
            milliseconds, page = scraper.scrape()
            times.append(milliseconds)
            live_counts.append(value(page, "vllm:num_requests_running") + value(page, "vllm:num_requests_waiting"))
        elapsed = time.perf_counter() - start
        seconds, count = inside(page)[0] - seconds, inside(page)[1] - count
        tokens = value(page, "vllm:generation_tokens_total") - tokens
    finally:
        clients.kill()
        clients.wait()
    times.sort()
    return {
        "streams": streams,
        "live": statistics.median(live_counts),
        "tokens_per_s": tokens / elapsed,
        "page_bytes": len(page),
        "inside_ms": 1e3 * seconds / count,
        "p50_ms": statistics.median(times),
        "p95_ms": times[int(0.95 * (len(times) - 1))],
        "max_ms": times[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--streams", type=int, nargs="+", default=[0, 100, 1000])
    parser.add_argument("--scrapes", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=1900)
    parser.add_argument("--clients", nargs=2, metavar=("URL", "COUNT"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS / "metrics_scrape.json")
    options = parser.parse_args()
    if options.clients:
        asyncio.run(read_streams(options.clients[0], int(options.clients[1]), options.max_tokens))
        return

    rows = []
    for streams in options.streams:
        with Server(options.model) as server:
            rows.append(measure(server, streams, options.scrapes, options.max_tokens))
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    write_results(options.output, goal_ms=GOAL_MS, rows=rows)


if __name__ == "__main__":
    main()
