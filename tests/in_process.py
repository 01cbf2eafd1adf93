"""The server's application in this process, over an executor that computes nothing: what is left behind can be seen.

async with serving(max_num_queued_reqs=2) as site:
    answer = await site.ask([1, 2, 3], max_tokens=8)        # /v1/completions, with token ids
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
from fake_executor import FakeExecutor, engine_config

from nanovllm import AsyncLLM
from nanovllm.engine.invariants import InvariantChecker
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.thread_core import ThreadCore
from nanovllm.entrypoints.serve.admission import Admission
from nanovllm.entrypoints.serve.app import build_app
from nanovllm.entrypoints.serve.args import ServeArgs

COMPLETIONS = "/v1/completions"


class Site:
    """A running application.

    Attributes:
        client: sends requests to it.
        checker: of the scheduler behind it.
    """

    def __init__(self, llm: AsyncLLM, client: httpx.AsyncClient, app: Any) -> None:
        assert isinstance(llm._core, ThreadCore)
        self.llm, self.client, self.app = llm, client, app
        self.scheduler: Scheduler = llm._core.core.scheduler
        self.checker = InvariantChecker(self.scheduler)
        self.admission: Admission = app.state.context.admission

    async def ask(
        self, prompt: Any, key: str | None = None, headers: dict[str, str] | None = None, **fields: Any
    ) -> Any:
        body = {"prompt": prompt, "ignore_eos": True, "temperature": 0, **fields}
        return await self.client.post(COMPLETIONS, json=body, headers={**bearer(key), **(headers or {})})

    def start(self, *arguments: Any, **fields: Any) -> asyncio.Task[Any]:
        """`ask`, under way."""
        return asyncio.create_task(self.ask(*arguments, **fields))

    async def until(self, condition: Any, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.002)

    async def idle(self) -> None:
        """Wait until nothing is under way; nothing may be left behind."""
        await self.until(lambda: not self.scheduler.has_work)
        await self.until(lambda: self.llm.stats.num_running + self.llm.stats.num_waiting == 0)
        self.checker.idle()
        assert self.llm.output.num_requests == self.llm.output.num_prefill_tokens == 0
        assert not self.llm._streams and self.admission.num_places == 0
        assert all(account.num_calls == 0 for account in self.admission.accounts.values())

    async def metrics(self) -> dict[str, float]:
        """The samples of the page: name and labels, without those that all have -> value."""
        text = (await self.client.get("/metrics")).text
        found = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[re.sub(r'(engine="0"|model_name="fake"),?', "", name).replace(",}", "}")] = float(value)
        return found


@contextlib.asynccontextmanager
async def serving(
    engine: dict[str, Any] | None = None, executor: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[Site]:
    """An application with settings of `ServeArgs`, `engine_config`, `FakeExecutor`; it must leave nothing behind."""
    llm = AsyncLLM(
        engine_config(**(engine or {})), FakeExecutor(**{"num_blocks": 200, "seconds": 0.002, **(executor or {})})
    )
    try:
        app = build_app(llm, ServeArgs(served_model_name=["fake"], **settings))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
            site = Site(llm, client, app)
            yield site
            await site.idle()
    finally:
        llm.shutdown()


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}
