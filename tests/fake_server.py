"""A server that speaks as much HTTP as its answers need, for tests of clients. Every answer is written by the test."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FakeRequest:
    """What a client sent."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class FakeAnswer:
    """What it is answered with.

    Attributes:
        body: sent with a Content-Length; or the pieces of a chunked answer, each sent when the iterator yields it.
        cut: end the connection without the chunk that ends an answer.
        close: say that the connection ends with the answer, and end it.
    """

    body: bytes | AsyncIterator[bytes]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    close: bool = False


class FakeServer:
    """Answers requests with a function, on a thread of its own.

    Attributes:
        url: without a path.
        requests: all so far.
        num_connections: all so far.
    """

    def __init__(self, answer: Callable[[FakeRequest], FakeAnswer]) -> None:
        self.requests: list[FakeRequest] = []
        self.num_connections = 0
        self._answer = answer
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._server = starting.result(10)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        async def stop() -> None:
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = head.rstrip("\r\n").split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = first.split(" ")
                request = FakeRequest(method, path, headers, body)
                self.requests.append(request)
                answer = self._answer(request)
                await self._write(writer, answer)
                if answer.cut or answer.close:
                    return
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _write(self, writer: asyncio.StreamWriter, answer: FakeAnswer) -> None:
        headers = dict(answer.headers)
        if answer.close:
            headers["Connection"] = "close"
        if isinstance(answer.body, bytes):
            headers["Content-Length"] = str(len(answer.body))
        else:
            headers["Transfer-Encoding"] = "chunked"
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {answer.status} Words\r\n{lines}\r\n".encode())
        if isinstance(answer.body, bytes):
            writer.write(answer.body)
        else:
            async for piece in answer.body:
                writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                await writer.drain()
            if not answer.cut:
                writer.write(b"0\r\n\r\n")
        await writer.drain()


def json_answer(content: Any, status: int = 200) -> FakeAnswer:
    return FakeAnswer(json.dumps(content).encode(), status, {"Content-Type": "application/json"})


def event(content: Any) -> bytes:
    data = content if isinstance(content, str) else json.dumps(content)
    return f"data: {data}\n\n".encode()


def events(*contents: Any, delay: float = 0.0, then: bytes = b"data: [DONE]\n\n") -> FakeAnswer:
    """Server-sent events with so many seconds between them."""

    async def pieces() -> AsyncIterator[bytes]:
        for content in contents:
            yield event(content)
            await asyncio.sleep(delay)
        if then:
            yield then

    return FakeAnswer(pieces(), headers={"Content-Type": "text/event-stream"})


def completion_events(
    *texts: str, prompt_tokens: int = 3, completion_tokens: int | None = None, delay: float = 0.0
) -> FakeAnswer:
    """A streamed completion, as vLLM's server sends it with ``include_usage``."""
    count = len(texts) if completion_tokens is None else completion_tokens
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + count, "completion_tokens": count}
    chunks: list[Any] = [{"choices": [{"index": 0, "text": text, "finish_reason": None}]} for text in texts]
    return events(*chunks, {"choices": [], "usage": usage}, delay=delay)


def chat_events(*texts: str, prompt_tokens: int = 3, delay: float = 0.0, reason: str = "stop") -> FakeAnswer:
    """A streamed chat completion, as vLLM's server sends it with ``include_usage``."""
    count = len(texts)
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + count, "completion_tokens": count}
    deltas = [{"role": "assistant", "content": ""}, *({"content": text} for text in texts)]
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
    return events(*chunks, last, {"choices": [], "usage": usage}, delay=delay)
