"""``nanovllm run-batch``: a file of API requests in, a file of their answers out.

Every line of the input is a JSON object ``{"custom_id", "method": "POST", "url", "body"}``, as in OpenAI's batch API.
The requests are handed to the same application that ``nanovllm serve`` serves, without a socket between. A line that
cannot be answered becomes a line with an error; the order stays. Results are in a file beside the output until all are
there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from nanovllm.entrypoints.cli.bench_serve_flags import positive
from nanovllm.entrypoints.cli.flags import add_engine_flags, engine_args
from nanovllm.entrypoints.cli.lines import say
from nanovllm.entrypoints.cli.parser import CommandParser, UsageError

if TYPE_CHECKING:
    import httpx
    from fastapi import FastAPI

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages")
_PART = ".part"  # of a file that is being written


def add_arguments(parser: CommandParser) -> None:
    """Options of the command."""
    from nanovllm.entrypoints.cli.serve_flags import add_serve_flags

    parser.usage = "%(prog)s -i FILE -o FILE [options]"
    parser.epilog = "Example: nanovllm run-batch -i requests.jsonl -o answers.jsonl --model Qwen/Qwen3-0.6B"
    text = "requests, one JSON object per line; - is standard input"
    parser.add_argument("--input-file", "-i", required=True, metavar="FILE|URL", help=text)
    text = "answers, one per line, in the order of the requests; - is standard output; a URL is sent a PUT"
    parser.add_argument("--output-file", "-o", required=True, metavar="FILE|URL", help=text)
    text = "folder for results until the last is there (default: the output's)"
    parser.add_argument("--output-tmp-dir", metavar="FOLDER", help=text)
    text = "most requests under way at once (default: twice --max-num-seqs, so that the engine never waits)"
    parser.add_argument("--max-concurrency", type=positive, metavar="N", help=text)
    parser.add_argument("--verbose", "-v", action="store_true", help="show the engine's messages")
    add_serve_flags(parser, ["answers"])
    add_engine_flags(parser, without=("reasoning_parser",))


def run(arguments: argparse.Namespace) -> int:
    """Answer the requests."""
    with ExitStack() as stack:
        source = _open_input(arguments.input_file, stack)
        total = sum(1 for _ in _lines(source))
        source.seek(0)
        output = _Output(arguments.output_file, arguments.output_tmp_dir)
        try:
            num_errors = asyncio.run(_answer_all(arguments, source, total, output))
        except BaseException:
            output.keep_part()
            raise
        count = output.finish()
    say(f"{count} requests, {num_errors} of them with an error")
    return 0


async def _answer_all(arguments: argparse.Namespace, source: IO[bytes], total: int, output: _Output) -> int:
    """Returns the number of errors."""
    from tqdm import tqdm

    from nanovllm.entrypoints.cli.loading import load_async_llm
    from nanovllm.entrypoints.cli.serve_flags import serve_args
    from nanovllm.entrypoints.serve.app import build_app

    args = serve_args(arguments)
    args.api_key = []  # nobody but this file asks
    engine = load_async_llm(engine_args(arguments), arguments.verbose)
    try:
        places = asyncio.Semaphore(arguments.max_concurrency or 2 * engine.config.scheduler.max_num_seqs)
        app = build_app(engine, args)
        with tqdm(total=total, desc="Requests", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
            return await _Batch(app, places, output, bar).run(source)
    finally:
        engine.shutdown()


class _Batch:
    """Requests to an application, so many at a time, and their answers in order."""

    def __init__(self, app: FastAPI, places: asyncio.Semaphore, output: _Output, bar: Any) -> None:
        self._app = app
        self._places = places
        self._output = output
        self._bar = bar
        self._done: dict[int, str] = {}  # answers that wait for an earlier one
        self._written = 0
        self._num_errors = 0

    async def run(self, source: IO[bytes]) -> int:
        """Answer every line; returns the number of errors."""
        import httpx

        transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
        tasks: set[asyncio.Task[None]] = set()
        async with httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as client:
            try:
                for index, line in enumerate(_lines(source)):
                    await self._places.acquire()
                    task = asyncio.create_task(self._one(client, index, line))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    for failed in [each for each in tasks if each.done()]:
                        failed.result()
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
        return self._num_errors

    async def _one(self, client: httpx.AsyncClient, index: int, line: bytes) -> None:
        try:
            answer = await _answer(client, line)
        finally:
            self._places.release()
        self._num_errors += answer["error"] is not None
        self._done[index] = json.dumps(answer, ensure_ascii=False)
        while self._written in self._done:
            self._output.write(self._done.pop(self._written))
            self._written += 1
        self._bar.update()


async def _answer(client: httpx.AsyncClient, line: bytes) -> dict[str, Any]:
    """The line of output for a line of input."""
    custom_id = None
    try:
        request = json.loads(line)
        if not isinstance(request, dict):
            raise ValueError("a request is a JSON object")
        custom_id = request.get("custom_id")
        url, body = _check(request)
    except ValueError as error:
        message = f"not a request: {error}"
        return _result(custom_id, 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}})
    answer = await client.post(url, json=body)
    try:
        content = answer.json()
    except ValueError:
        content = {"error": {"message": answer.text, "type": "InternalServerError", "code": answer.status_code}}
    return _result(custom_id, answer.status_code, content)


def _check(request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The path and body of a request.

    Raises:
        ValueError: it cannot be sent.
    """
    if not isinstance(request.get("custom_id"), str):
        raise ValueError("custom_id must be a string")
    if request.get("method", "POST") != "POST":
        raise ValueError(f"method must be POST, not {request['method']!r}")
    url = request.get("url")
    if url not in URLS:
        raise ValueError(f"url must be one of {', '.join(URLS)}, not {url!r}")
    body = request.get("body")
    if not isinstance(body, dict):
        raise ValueError("body must be a JSON object")
    if body.get("stream"):
        raise ValueError("an answer in a file cannot be streamed; leave out stream")
    return url, body


def _result(custom_id: Any, status: int, content: Any) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"nanovllm-batch-{uuid.uuid4().hex}"}
    good = status == 200
    return {
        "id": f"nanovllm-{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": {**response, "body": content if good else None},
        "error": None if good else content,
    }


def _lines(source: IO[bytes]) -> Iterator[bytes]:
    for number, line in enumerate(source):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
        if line.strip():
            yield line


# -- where requests come from and answers go --------------------------------------------------------------------------


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _open_input(name: str, stack: ExitStack) -> IO[bytes]:
    """The requests; standard input and downloads are copied to the disk first."""
    if name != "-" and not _is_url(name):
        try:
            return stack.enter_context(open(name, "rb"))
        except OSError as error:
            raise UsageError(f"--input-file {name}: {error.strerror}") from None
    copy = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    if name == "-":
        if sys.stdin is None:
            raise UsageError("standard input is closed")
        shutil.copyfileobj(sys.stdin.buffer, copy)
    else:
        _download(name, copy)
    copy.seek(0)
    return copy


def _download(name: str, copy: IO[bytes]) -> None:
    import httpx

    try:
        with httpx.stream("GET", name, follow_redirects=True) as answer:
            answer.raise_for_status()
            for data in answer.iter_bytes():
                copy.write(data)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UsageError(f"--input-file {name}: {' '.join(str(error).split())}") from None


class _Output:
    """Lines that become the output when all are there.

    Raises:
        UsageError: they cannot be written there.
    """

    def __init__(self, name: str, folder: str | None) -> None:
        self._name = name
        self._count = 0
        self._part: Path | None = None
        if name == "-":
            self._file = sys.stdout
            return
        try:
            if _is_url(name):
                handle, path = tempfile.mkstemp(suffix=_PART, dir=folder)
                os.close(handle)
                self._part = Path(path)
            else:
                target = Path(name)
                if target.is_dir():
                    raise UsageError(f"--output-file {name}: is a folder")
                self._part = (Path(folder) if folder else target.parent) / (target.name + _PART)
            self._file = self._part.open("w", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--output-file {name}: {error.strerror}") from None

    def write(self, line: str) -> None:
        """Add a line."""
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UsageError(f"--output-file {self._part or self._name}: {error.strerror}") from None
        self._count += 1

    def finish(self) -> int:
        """Put the lines where they belong; returns how many there are."""
        if self._part is None:
            return self._count
        self._file.close()
        try:
            if _is_url(self._name):
                self._upload(self._part)
            else:
                shutil.move(self._part, self._name)
        except OSError as error:
            raise UsageError(f"--output-file {self._name}: {error.strerror}; the answers are in {self._part}") from None
        return self._count

    def keep_part(self) -> None:
        """The run has ended early."""
        if self._part is None:
            return
        with suppress(OSError):  # what was not written is not counted
            self._file.close()
        if self._count:
            say(f"{self._count} answers are in {self._part}")
        else:
            self._part.unlink(missing_ok=True)

    def _upload(self, part: Path) -> None:
        import httpx

        try:
            with part.open("rb") as lines:
                httpx.put(self._name, content=lines, timeout=None).raise_for_status()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            message = " ".join(str(error).split())
            raise UsageError(f"--output-file {self._name}: {message}; the answers are in {part}") from None
        part.unlink()
