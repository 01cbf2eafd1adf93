"""Online benchmark: requests that arrive over time at a server, and how long each had to wait for its tokens."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nanovllm.entrypoints.bench.backends import BACKENDS, AnswerNotes, RequestResult, error_text, note_usage
from nanovllm.entrypoints.bench.http_stream import HttpClient

if TYPE_CHECKING:
    from nanovllm.entrypoints.bench.datasets import SampleRequest

READY_CHECK_INTERVAL = 0.1  # seconds


@dataclass(frozen=True, slots=True)
class Target:
    """What is measured.

    Attributes:
        base_url: of the server, without the endpoint's path.
        model: name the server knows the model by.
        backend: name in `BACKENDS`.
        endpoint: path, if not the backend's own.
        headers: of every request.
        extra_body: laid over what is posted.
        request_id_prefix: of the header ``x-request-id``.
        verify: whether the certificate of an https server is checked.
    """

    base_url: str
    model: str
    backend: str = "openai"
    endpoint: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    request_id_prefix: str | None = None
    verify: bool = True

    def client(self) -> HttpClient:
        """Raises: ValueError: the URL is none."""
        return HttpClient(self.base_url, self.headers, self.verify)


async def send(client: HttpClient, target: Target, request: SampleRequest, name: str = "") -> RequestResult:
    """Send a request and note its answer; what goes wrong is noted too."""
    backend = BACKENDS[target.backend]
    body = json.dumps({**backend.payload(request, target.model), **target.extra_body}).encode()
    headers = {} if target.request_id_prefix is None else {"x-request-id": f"{target.request_id_prefix}{name}"}
    result = RequestResult(prompt_len=request.prompt_len, start_time=time.perf_counter())
    notes = None if backend.piece is None else AnswerNotes(backend, result)
    path = target.endpoint or backend.endpoint
    try:
        answer = await client.request("POST", path, body, headers, None if notes is None else notes.take)
        if answer.status != 200:
            result.error = f"HTTP {answer.status}: {error_text(answer.body)}"
            return result
        if notes is not None:
            notes.finish()
        else:
            result.latency = answer.finished - result.start_time
            result.output_len = 0
            note_usage(result, json.loads(answer.body).get("usage") or {})
        result.success = True
    except (OSError, ValueError) as error:
        result.error = str(error) or type(error).__name__
    return result


async def wait_until_ready(target: Target, request: SampleRequest, timeout: float) -> str | None:
    """Send a request again and again until it is answered.

    Args:
        timeout: seconds after which to give up.

    Returns:
        The last error; None if there is an answer.
    """
    end = time.perf_counter() + timeout
    client = target.client()
    try:
        while True:
            result = await send(client, target, request, "ready")
            if result.success:
                return None
            if time.perf_counter() + READY_CHECK_INTERVAL > end:
                return result.error
            await asyncio.sleep(READY_CHECK_INTERVAL)
    finally:
        client.close()


async def measure_serving(
    target: Target,
    requests: Sequence[SampleRequest],
    times: Sequence[float],
    *,
    max_concurrency: int | None = None,
    use_tqdm: bool = True,
    description: str | None = None,
) -> tuple[list[RequestResult], float]:
    """Send requests at their times.

    Args:
        times: seconds after the start, ascending, one for each request.
        max_concurrency: requests that may be under way at once; the others wait for a place.

    Returns:
        Results in the order of the requests, and seconds from the start to the last answer.
    """
    from tqdm import tqdm

    client = target.client()
    places = asyncio.Semaphore(max_concurrency or len(requests))
    try:
        with tqdm(total=len(requests), desc=description, dynamic_ncols=True, disable=not use_tqdm) as bar:

            async def one(index: int) -> RequestResult:
                arrived = time.perf_counter()
                async with places:
                    result = await send(client, target, requests[index], str(index))
                result.queue_time = result.start_time - arrived
                bar.update()
                return result

            start = time.perf_counter()
            tasks = []
            for index, at in enumerate(times):
                if (delay := start + at - time.perf_counter()) > 0:
                    await asyncio.sleep(delay)
                tasks.append(asyncio.create_task(one(index)))
            results = await asyncio.gather(*tasks)
            return results, time.perf_counter() - start
    finally:
        client.close()


async def first_model(target: Target) -> tuple[str, str]:
    """Name and checkpoint of the first model a server lists.

    Raises:
        OSError, ValueError: it does not answer, or with an error.
    """
    client = target.client()
    try:
        answer = await client.request("GET", "/v1/models")
    finally:
        client.close()
    if answer.status != 200:
        raise ValueError(f"HTTP {answer.status}: {error_text(answer.body)}")
    try:
        model = json.loads(answer.body)["data"][0]
        return str(model["id"]), str(model.get("root") or model["id"])
    except (LookupError, TypeError) as error:
        raise ValueError("/v1/models lists no model") from error
