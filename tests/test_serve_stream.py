"""Server-sent events without a server: their bytes, errors, clients that leave, streams that run together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.entrypoints.serve.generation import final_outputs, merged
from nanovllm.entrypoints.serve.sse import EventStream, event, json_bytes, json_text, leave_on_disconnect
from nanovllm.errors import EngineDeadError, ParameterError
from nanovllm.outputs import CompletionOutput, RequestOutput


@given(st.text())
def test_text_survives_and_no_reader_of_lines_cuts_it(text: str):
    encoded = json_text(text)
    assert json.loads(encoded) == text and len(encoded.splitlines()) == 1
    data = event({"text": text})
    assert json.loads(data.removeprefix(b"data: ")) == {"text": text} and data.endswith(b"}\n\n")
    assert len(data.decode().splitlines()) == 2
    assert json.loads(json_bytes([text, 1, None])) == [text, 1, None]


class Connection:
    """What a server gives an application; ``gone`` says that the client has left."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.sent: list[Any] = []

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


def answer(events: AsyncIterator[bytes], path: str = "/v1/completions", **options: Any) -> Connection:
    """What goes out for a stream of events."""

    async def main() -> Connection:
        connection = Connection()
        await EventStream(events, path, **options)({"type": "http"}, connection.receive, connection.send)
        return connection

    return asyncio.run(main())


async def failing(error: Exception, *before: bytes) -> AsyncIterator[bytes]:
    for data in before:
        yield data
    raise error


def test_what_goes_wrong_before_the_first_event_has_a_status():
    connection = answer(failing(ParameterError("no", "top_p", 3)))
    assert connection.status == 400 and json.loads(connection.body)["error"]["param"] == "top_p"
    assert answer(failing(EngineDeadError("dead"))).status == 503


def test_what_goes_wrong_later_is_an_event_and_the_stream_ends():
    connection = answer(failing(EngineDeadError("dead"), b"data: {}\n\n"))
    assert connection.status == 200 and not connection.sent[-1]["more_body"]
    first, error, done = connection.body.strip().split(b"\n\n")
    assert (first, done) == (b"data: {}", b"data: [DONE]")
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == 503
    claude = answer(failing(EngineDeadError("dead"), b"data: {}\n\n"), "/v1/messages", ending=b"")
    assert b"event: error\ndata: " in claude.body and b"[DONE]" not in claude.body


def test_silence_is_filled_with_comments():
    async def slow() -> AsyncIterator[bytes]:
        await asyncio.sleep(0.05)
        yield b"data: 1\n\n"
        await asyncio.sleep(0.05)
        yield b"data: 2\n\n"

    body = answer(slow(), keep_alive=0.01).body
    assert body.startswith(b": keep-alive\n\n") and b"data: 1\n\n: keep-alive\n\n" in body
    assert body.replace(b": keep-alive\n\n", b"") == b"data: 1\n\ndata: 2\n\n"
    assert answer(slow()).body == b"data: 1\n\ndata: 2\n\n"


@pytest.mark.parametrize("keep_alive", [0.0, 0.01])
def test_a_client_that_leaves_closes_the_source(keep_alive: float):
    closed: list[str] = []

    async def endless() -> AsyncIterator[bytes]:
        try:
            yield b"data: 1\n\n"
            await asyncio.sleep(60)
        finally:
            closed.append("source")

    async def main() -> None:
        connection = Connection()
        stream = EventStream(endless(), "/v1/completions", keep_alive)
        task = asyncio.create_task(stream({"type": "http"}, connection.receive, connection.send))
        while len(connection.sent) < 2:
            await asyncio.sleep(0)
        connection.gone.set()
        await asyncio.wait_for(task, 5)
        assert closed == ["source"]

    asyncio.run(main())


def test_a_client_that_leaves_while_a_comment_is_on_its_way_closes_the_source():
    closed: list[str] = []

    async def silent() -> AsyncIterator[bytes]:
        try:
            yield b"data: 1\n\n"
            await asyncio.sleep(60)
        finally:
            closed.append("source")

    async def main() -> None:
        connection = Connection()
        stuck = asyncio.Event()

        async def send(message: Any) -> None:
            if message.get("body") == b": keep-alive\n\n":
                stuck.set()
                await asyncio.sleep(60)

        stream = EventStream(silent(), "/v1/completions", 0.01)
        task = asyncio.create_task(stream({"type": "http"}, connection.receive, send))
        await stuck.wait()
        connection.gone.set()
        await asyncio.wait_for(task, 5)
        assert closed == ["source"]

    asyncio.run(main())


def test_work_is_cancelled_when_nobody_waits_for_it():
    async def main() -> None:
        connection = Connection()
        cancelled = asyncio.Event()

        async def work() -> str:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return "done"

        asyncio.get_running_loop().call_later(0.01, connection.gone.set)
        assert await leave_on_disconnect(connection.receive, work()) is None and cancelled.is_set()

    asyncio.run(main())


# -- streams that run together ----------------------------------------------------------------------------------------


async def outputs(
    name: str, count: int, closed: list[str], error: Exception | None = None
) -> AsyncGenerator[Any, None]:
    try:
        for number in range(count):
            await asyncio.sleep(0)
            yield RequestOutput(name, None, [1], outputs=[CompletionOutput(0, str(number), [number])])
        if error is not None:
            raise error
    finally:
        closed.append(name)


def test_streams_keep_their_numbers_and_their_order():
    async def main() -> None:
        closed: list[str] = []
        seen: dict[int, list[str]] = {0: [], 1: [], 2: []}
        async for index, output in merged([outputs(str(i), i + 2, closed) for i in range(3)]):
            assert output.request_id == str(index)
            seen[index].append(output.text)
        assert seen == {0: ["0", "1"], 1: ["0", "1", "2"], 2: ["0", "1", "2", "3"]}
        finals = await final_outputs([outputs(str(i), i + 2, closed) for i in range(3)])
        assert [output.text for output in finals] == ["1", "2", "3"] and sorted(closed) == sorted("012012")

    asyncio.run(main())


def test_a_stream_that_fails_ends_the_others():
    async def main() -> None:
        closed: list[str] = []
        streams = [outputs("endless", 10**9, closed), outputs("failing", 3, closed, ParameterError("no", "stop", 1))]
        with pytest.raises(ParameterError):
            await asyncio.wait_for(final_outputs(streams), 5)
        assert sorted(closed) == ["endless", "failing"]

    asyncio.run(main())


def test_a_reader_that_takes_its_time_holds_the_streams_back():
    async def main() -> None:
        taken = 0

        async def counted() -> AsyncGenerator[Any, None]:
            nonlocal taken
            async for output in outputs("x", 1000, []):
                taken += 1
                yield output

        source = merged([counted(), counted()])
        await source.__anext__()
        await asyncio.sleep(0.02)
        assert taken <= 4
        await source.aclose()

    asyncio.run(main())
