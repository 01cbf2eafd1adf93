"""What requests leave behind in the front's memory: nothing, or something that is collected in time."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref
from asyncio.selector_events import _SelectorSocketTransport as Transport
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from nanovllm.engine.stats import EngineStats
from nanovllm.entrypoints.serve.connections import Connections
from nanovllm.entrypoints.serve.memory import FEW_BLOCKS, FLOOD, MANY_BLOCKS, MOST_KEPT, Memory


@pytest.fixture(autouse=True)
def no_collection_by_itself() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Body:
    """Garbage as exceptions and frames are: it refers to itself."""

    def __init__(self, size: int = 1) -> None:
        self.parts: list[Any] = [object() for _ in range(size)]
        self.parts.append(self)


def settled() -> Memory:
    memory = Memory()
    memory.look(0)
    return memory


def test_the_body_of_a_failed_request_goes_when_bytes_have_come_together():
    memory, body = settled(), Body()
    gone = weakref.ref(body)
    del body
    memory.dealt_with(MOST_KEPT // 2)
    assert gone() is not None
    memory.dealt_with(MOST_KEPT)
    assert gone() is None


def test_at_rest_goes_what_was_under_way_while_others_were_collected():
    """It has grown old, and no collection of the young finds it."""
    memory, body = settled(), Body()
    gone = weakref.ref(body)
    memory.dealt_with(MOST_KEPT + 1)
    del body
    memory.dealt_with(MOST_KEPT + 1)
    memory.look(3)
    assert gone() is not None
    memory.look(0)
    assert gone() is None


def test_under_load_old_garbage_does_not_pile_up():
    memory, garbage = settled(), []
    for _ in range(100):  # never at rest
        body = Body(MANY_BLOCKS // 20)
        memory.dealt_with(MOST_KEPT + 1)  # while the body is in use
        garbage.append(weakref.ref(body))
        del body
        memory.look(50)
    assert sum(each() is not None for each in garbage) < 30


@pytest.mark.parametrize("size", [FEW_BLOCKS // 10, 2 * FEW_BLOCKS])
def test_at_rest_nothing_is_done_for_little(size: int):
    memory, body = settled(), Body(size)
    gone = weakref.ref(body)
    del body
    memory.look(1)
    assert gone() is not None
    memory.look(0)
    assert (gone() is None) == (size > FEW_BLOCKS)


def test_the_end_of_a_flood_counts_as_rest():
    memory, body = settled(), Body()
    gone = weakref.ref(body)
    del body
    memory.look(FLOOD)
    memory.look(FLOOD // 2)
    assert gone() is not None
    memory.look(FLOOD // 5)
    assert gone() is None


def test_connections_that_have_ended_leave_nothing_to_the_collector():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    def ask(address: Any) -> bytes:
        with socket.create_connection(address) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return b"".join(iter(lambda: client.recv(1000), b""))

    async def main() -> int:
        connections = Connections(EngineStats(), 0.0, None)
        server = uvicorn.Server(
            uvicorn.Config(app, http=connections.protocol(), lifespan="off", ws="none", log_config=None)
        )
        with socket.create_server(("127.0.0.1", 0)) as listener:
            task = asyncio.create_task(server._serve([listener]))
            for _ in range(20):
                assert b"200 OK" in await asyncio.to_thread(ask, listener.getsockname())
            while server.server_state.connections:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.01)
            left = sum(isinstance(each, Transport) for each in gc.get_objects())
            server.should_exit = True
            await task
        return left

    assert asyncio.run(main()) == 0
