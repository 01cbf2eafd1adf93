"""The HTTP client of ``bench serve``: connections that last, and events however their bytes arrive."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import numpy as np
import pytest
from fake_server import FakeAnswer, FakeRequest, FakeServer

from nanovllm.entrypoints.bench.http_stream import HttpClient


def client_run(server: FakeServer, *paths: str) -> list[tuple[int, bytes]]:
    async def run() -> list[tuple[int, bytes]]:
        client = HttpClient(server.url + "/base/")
        answers = [await client.request("GET", path) for path in paths]
        client.close()
        return [(answer.status, answer.body) for answer in answers]

    return asyncio.run(run())


def test_connections_are_used_again():
    with FakeServer(lambda request: FakeAnswer(request.path.encode())) as server:
        assert client_run(server, "/1", "/2", "/3") == [(200, b"/base/1"), (200, b"/base/2"), (200, b"/base/3")]
        assert server.num_connections == 1


def test_a_connection_the_server_closes_is_replaced():
    def answer(request: FakeRequest) -> FakeAnswer:
        return FakeAnswer(b"", 204, close=True) if request.path.endswith("/1") else FakeAnswer(b"x", cut=True)

    with FakeServer(answer) as server:
        assert client_run(server, "/1", "/2", "/3") == [(204, b""), (200, b"x"), (200, b"x")]
        assert server.num_connections == 3


@pytest.mark.parametrize("seed", range(5))
def test_events_are_found_however_the_bytes_arrive(seed: int):
    contents = [f"{number} ü\\n" * (number % 4 + 1) for number in range(40)]
    body = b": a comment\n\n" + b"".join(b"data: " + json.dumps(text).encode() + b"\r\n\r\n" for text in contents)
    cuts = sorted(np.random.default_rng(seed).integers(0, len(body), 60).tolist())

    async def pieces() -> AsyncIterator[bytes]:
        for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True):
            if end > start:  # an empty chunk would end the answer
                yield body[start:end]

    seen: list[str] = []

    async def run() -> None:
        client = HttpClient(server.url)
        await client.request("POST", "/", b"{}", on_event=lambda data, _: seen.append(json.loads(data)))
        client.close()

    with FakeServer(lambda _: FakeAnswer(pieces())) as server:
        asyncio.run(run())
    assert seen == contents


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", ""])
def test_what_is_no_url_is_refused(url: str):
    with pytest.raises(ValueError, match="is not a URL"):
        HttpClient(url)
