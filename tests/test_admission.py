"""A full server and requests whose time is up: who is refused, how it is told, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from in_process import COMPLETIONS, Site, serving

from nanovllm import SamplingParams
from nanovllm.engine.caller import Caller
from nanovllm.entrypoints.serve.args import ServeArgs
from nanovllm.entrypoints.serve.quota import Pace
from nanovllm.errors import ParameterError, RequestTimeoutError

LONG = {"max_tokens": 100}


def refused(answer: Any, status: int = 503) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert status == 504 or 1 <= int(answer.headers["retry-after"]) <= 60
    return answer.json()["error"]


# -- a full server -----------------------------------------------------------------------------------------------------


def test_a_full_server_answers_503_in_the_shape_of_the_api_that_was_asked():
    async def main() -> None:
        async with serving(max_num_queued_reqs=2) as site:
            tasks = [site.start([1, 2], **LONG) for _ in range(2)]
            await site.until(lambda: site.admission.num_places == 2)
            error = refused(await site.ask([1, 2]))
            assert (error["type"], error["code"], error["param"]) == ("ServiceUnavailableError", 503, None)
            assert "2 requests are under way, of at most 2 (--max-num-queued-reqs)" in error["message"]
            for path in ("/v1/chat/completions", "/v1/responses", "/v1/embeddings"):
                assert refused(await site.client.post(path, json={}))["type"] == "ServiceUnavailableError"
            anthropic = await site.client.post("/v1/messages", json={})
            assert refused(anthropic)["type"] == "overloaded_error" and anthropic.json()["type"] == "error"
            assert (await site.client.get("/v1/models")).status_code == 200  # it runs nothing
            assert [(await task).status_code for task in tasks] == [200, 200]
            assert (await site.ask([1, 2])).status_code == 200  # there is room again
            assert (await site.metrics())['vllm:admission_rejections_total{reason="requests"}'] == 5

    asyncio.run(main())


def test_who_is_refused_is_refused_before_the_body_is_read():
    async def main() -> None:
        async with serving(max_num_queued_reqs=1) as site:
            task = site.start([1, 2], **LONG)
            await site.until(lambda: site.admission.num_places == 1)
            sent: list[Any] = []

            async def receive() -> Any:
                raise AssertionError("the body was read")

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": [], "query_string": b""}
            await site.app(scope, receive, send)
            assert sent[0]["status"] == 503
            await task

    asyncio.run(main())


def test_of_a_burst_as_many_get_in_as_there_are_places_and_all_of_them_are_answered():
    async def main() -> None:
        async with serving(max_num_queued_reqs=12) as site:
            answers = await asyncio.gather(*(site.ask([1, number % 90 + 3], max_tokens=20) for number in range(200)))
            good = [answer for answer in answers if answer.status_code == 200]
            assert len(good) == 12
            assert all(answer.json()["usage"]["completion_tokens"] == 20 for answer in good)
            assert all(refused(answer) for answer in answers if answer.status_code != 200)
            assert (await site.metrics())['vllm:admission_rejections_total{reason="requests"}'] == 188

    asyncio.run(main())


def test_every_output_takes_a_place_and_what_is_larger_than_the_limit_is_let_in_alone():
    async def main() -> None:
        async with serving(max_num_queued_reqs=4) as site:
            two = {"n": 2, "temperature": 1.0, "max_tokens": 5}
            assert (await site.ask([[1, 2], [3, 4]], **two)).status_code == 200
            assert (await site.ask([[1, 2], [3, 4], [5, 6]], **two)).status_code == 200  # 6 of 4, alone
            task = site.start([1, 2], **LONG)
            await site.until(lambda: site.admission.num_places == 1)
            refused(await site.ask([[1, 2], [3, 4]], **two))
            assert site.admission.num_places == 1  # what was refused holds nothing
            assert (await site.ask([1, 2], n=3, temperature=1.0, max_tokens=5)).status_code == 200
            await task

    asyncio.run(main())


def test_prompts_that_wait_for_their_first_token_are_bounded():
    async def main() -> None:
        async with serving(max_num_queued_tokens=50, engine={"max_num_seqs": 1}) as site:
            running = site.start([1] * 60, max_tokens=60)
            await site.until(lambda: site.llm.stats.generation_tokens > 0)
            assert site.llm.output.num_prefill_tokens == 0  # a request with a first token does not count
            waiting = site.start([1] * 50, max_tokens=3)
            await site.until(lambda: site.llm.output.num_prefill_tokens == 50)
            assert "50 tokens of prompts have to be computed first" in refused(await site.ask([1]))["message"]
            assert {(await running).status_code, (await waiting).status_code} == {200}
            for prompt in ([1], [[1] * 40] * 3):  # prompts of one request do not keep each other out
                assert (await site.ask(prompt, max_tokens=2)).status_code == 200

    asyncio.run(main())


def test_prompts_that_come_at_once_are_counted_before_they_are_queued():
    async def main() -> None:
        async with serving(max_num_queued_tokens=20, executor={"seconds": 0.05}) as site:
            answers = await asyncio.gather(*(site.ask([number + 3] * 15, max_tokens=2) for number in range(6)))
            assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503, 503, 503]
            assert (await site.metrics())['vllm:admission_rejections_total{reason="tokens"}'] == 4

    asyncio.run(main())


def test_a_client_that_leaves_gives_its_place_back():
    async def main() -> None:
        async with serving(max_num_queued_reqs=1) as site:
            task = site.start([1, 2], **LONG)
            await site.until(lambda: site.llm.stats.num_running == 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await site.idle()
            assert (await site.ask([1, 2], max_tokens=2)).status_code == 200

    asyncio.run(main())


def test_when_to_try_again_follows_what_has_ended_of_late():
    pace = Pace()
    assert pace.wait(5, 0.0) == 0.0
    for second in range(10):
        pace.ended(100.0 + second)
    assert pace.wait(5, 110.0) == pytest.approx(5)  # one a second
    assert pace.wait(5, 120.0) == pytest.approx(10)  # and then nothing for a while
    assert pace.wait(5, 400.0) == 0.0  # long ago


@pytest.mark.parametrize("name", ["max_num_queued_reqs", "max_num_queued_tokens", "request_timeout"])
def test_limits_are_not_negative(name: str):
    with pytest.raises(ParameterError, match="must not be negative"):
        ServeArgs(**{name: -1})


# -- time-outs ---------------------------------------------------------------------------------------------------------


def test_a_request_whose_time_is_up_is_a_504_and_frees_everything():
    async def main() -> None:
        async with serving(request_timeout=0.15, executor={"seconds": 0.01}) as site:
            error = refused(await site.ask([1, 2], **LONG), 504)  # it would take 1 s
            assert (error["type"], error["code"]) == ("RequestTimeoutError", 504)
            await site.idle()
            assert (await site.ask([1, 2], max_tokens=2)).status_code == 200
            found = await site.metrics()
            assert found["nanovllm:request_timeouts_total{}"] == 1
            assert found['vllm:request_success_total{finished_reason="abort"}'] == 1

    asyncio.run(main())


def test_a_request_that_waits_runs_out_of_time_too():
    async def main() -> None:
        async with serving(engine={"max_num_seqs": 1}, executor={"seconds": 0.01}) as site:
            running = site.start([1, 2], **LONG)
            await site.until(lambda: site.llm.stats.num_running == 1)
            refused(await site.ask([3, 4], headers={"X-Request-Timeout": "0.1"}), 504)
            await site.until(lambda: site.llm.stats.num_waiting == 0)
            assert (await running).json()["usage"]["completion_tokens"] == 100

    asyncio.run(main())


def test_the_shorter_of_the_two_times_counts():
    async def main() -> None:
        for own, asked in ((60, "0.1"), (0.1, "60")):  # the request takes at least 1 s
            async with serving(request_timeout=own, executor={"seconds": 0.01}) as site:
                refused(await site.ask([1, 2], headers={"X-Request-Timeout": asked}, **LONG), 504)

    asyncio.run(main())


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", ""])
def test_a_time_that_is_none_is_refused(value: str):
    async def main() -> None:
        async with serving() as site:
            answer = await site.ask([1, 2], headers={"X-Request-Timeout": value})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "X-Request-Timeout"

    asyncio.run(main())


def test_a_stream_whose_time_is_up_ends_with_an_event_that_says_so():
    async def main() -> None:
        async with serving(executor={"seconds": 0.01}) as site:
            options = {"headers": {"X-Request-Timeout": "0.3"}, "stream": True, "return_token_ids": True}
            answer = await site.ask([1, 2], **options, **LONG)
            assert answer.status_code == 200
            events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
            assert len(events) > 3 and events[-1] == "[DONE]"
            error = json.loads(events[-2])["error"]
            assert (error["type"], error["code"]) == ("RequestTimeoutError", 504)
            await site.idle()

    asyncio.run(main())


def test_a_stream_whose_time_is_up_before_its_first_token_is_a_504():
    async def main() -> None:
        async with serving(engine={"max_num_seqs": 1}, executor={"seconds": 0.01}) as site:
            running = site.start([1, 2], **LONG)
            await site.until(lambda: site.llm.stats.num_running == 1)
            refused(await site.ask([1, 2], headers={"X-Request-Timeout": "0.1"}, stream=True), 504)
            await running

    asyncio.run(main())


class By(Caller):
    """Somebody with a deadline, who keeps count."""

    def __init__(self, seconds: float | None) -> None:
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.used: list[int] = []

    def begins(self, num_prompt_tokens: int) -> None:
        self.used.append(num_prompt_tokens)

    def ended(self, num_generated_tokens: int) -> None:
        self.used.append(num_generated_tokens)


def test_the_engine_lets_go_in_time_however_slowly_outputs_are_read():
    async def main() -> None:
        async with serving(executor={"seconds": 0.01}) as site:
            caller = By(0.2)
            stream = site.llm.generate([1, 2, 3], SamplingParams(ignore_eos=True, **LONG), "a", caller=caller)
            await stream.__anext__()
            await asyncio.sleep(0.6)
            assert not site.scheduler.has_work  # nobody has read on
            with pytest.raises(RequestTimeoutError):
                await stream.__anext__()
            assert caller.used[0] == 3 and 0 < caller.used[1] < 100

    asyncio.run(main())


def test_what_was_finished_in_time_may_be_read_later():
    async def main() -> None:
        async with serving() as site:
            caller = By(0.5)
            stream = site.llm.generate([1, 2, 3], SamplingParams(ignore_eos=True, max_tokens=10), "a", caller=caller)
            await stream.__anext__()
            await asyncio.sleep(0.7)
            last = [output async for output in stream][-1]
            assert last.finished and len(last.token_ids) == 10 and caller.used == [3, 10]

    asyncio.run(main())


def test_a_deadline_holds_while_the_engine_is_not_ready():
    async def main() -> None:
        async with serving() as site:
            site.llm._ready = False
            caller = By(0.05)
            with pytest.raises(RequestTimeoutError):
                await site.llm.generate([1], SamplingParams(), "a", caller=caller).__anext__()
            assert caller.used == []  # it never began
            site.llm._ready = True

    asyncio.run(main())


def test_what_is_used_is_told_whatever_the_end():
    async def told(site: Site, name: str, **options: Any) -> list[int]:
        caller = By(options.pop("seconds", None))
        try:
            async for _ in site.llm.generate([1, 2], SamplingParams(ignore_eos=True, **options), name, caller=caller):
                if name == "left":
                    break
        except ParameterError:
            assert name == "refused"
        await site.idle()
        return caller.used

    async def main() -> None:
        async with serving() as site:
            assert await told(site, "whole", max_tokens=7) == [2, 7]
            assert await told(site, "many", max_tokens=7, n=3) == [2, 21]
            prompt, generated = await told(site, "left", max_tokens=90)
            assert prompt == 2 and 1 <= generated < 90
            assert await told(site, "refused", max_tokens=7, logprobs=21) == []  # it did not begin

    asyncio.run(main())
