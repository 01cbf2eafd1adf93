"""Tenants: what their file may say, whose a request is, quotas and what clients are told of them, usage."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from in_process import serving
from serving import ROOT, Served, served

from nanovllm.entrypoints.serve.accounts import Account, duration, whole_seconds
from nanovllm.entrypoints.serve.args import ServeArgs
from nanovllm.entrypoints.serve.errors import ServeError
from nanovllm.entrypoints.serve.quota import Bucket
from nanovllm.entrypoints.serve.tenants import Tenant, read_tenants
from nanovllm.errors import ParameterError

TWO = """
search:
  api_keys: [sk-one, sk-two]
  requests_per_minute: 600
  tokens-per-minute: 200_000
  max_concurrent_requests: 8
  weight: 2
batch:
  api_keys: sk-three
default:
  requests_per_minute: 30
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tenants.yaml"


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_file_says_who_may_do_what(file: Path):
    file.write_text(TWO)
    tenants = read_tenants(str(file))
    assert list(tenants) == ["default", "search", "batch"]
    assert tenants["search"] == Tenant("search", ("sk-one", "sk-two"), 600, 200_000, 8, 0, 2)
    assert tenants["batch"] == Tenant("batch", ("sk-three",))
    assert tenants["default"] == Tenant("default", requests_per_minute=30)
    assert "sk-one" not in repr(tenants)


def test_the_example_of_the_documents_is_right(file: Path):
    page = (ROOT / "docs" / "tenants.md").read_text(encoding="utf-8")
    file.write_text(re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0])
    tenants = read_tenants(str(file))
    assert set(tenants) == {"search", "batch", "default"} and tenants["batch"].priority == 10
    settings = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", page, re.MULTILINE))
    defaults = {"api_keys": "", "priority": "0", "weight": "1"}
    assert settings == {name: defaults.get(name, "no limit") for name in Tenant.__dataclass_fields__ if name != "name"}


WRONG = [
    ("", "names no tenant: write 'NAME:'"),
    ("- a\n- b", "line 1: the file is ['a', 'b']: write 'NAME:' and settings under it"),
    ("a: [", "is not YAML"),
    ("a: 5", "line 1: a is 5: write settings under it"),
    ("a:\n  weight: 2", "a.api_keys is 'nothing': give it at least one key"),
    ("a:\n  api_keys: []", "line 2: a.api_keys is '...': use a list of keys"),
    ("a:\n  api_keys: [12]", "line 2: a.api_keys is '...': use a list of keys, in quotation marks"),
    ("a:\n  api_keys: ['sk x ']", "line 2: a.api_keys is '...': a key is sent in a header"),
    ("a:\n  api_keys: [k, k]", "line 2: a.api_keys is '...': a key is there twice"),
    ("a:\n  api_keys: [k]\nb:\n  api_keys: [x, k]", "line 4: b.api_keys is '...': one of the keys is also that of a"),
    ("a:\n  api_keys: [own]", "one of the keys is also that of --api-key"),
    ("a:\n  api_keys: [k]\na:\n  api_keys: [x]", "line 3: a is '...': it is there twice"),
    ("a:\n  api_keys: [k]\n  weight: 1\n  weight: 2", "line 4: a.weight is '...': it is there twice"),
    ("a:\n  api_keys: [k]\n  api-keys: [x]", "line 3: a.api-keys is '...': it is there twice"),
    ("a:\n  api_keys: [k]\n  wieght: 2", "line 3: a.wieght is '...': there is no such setting; there are api_keys"),
    ("a:\n  api_keys: [k]\n  weight: 0", "line 3: a.weight is 0: use a number from 0.001 to 1000000"),
    ("a:\n  api_keys: [k]\n  weight: .nan", "line 3: a.weight is nan: use a number"),
    ("a:\n  api_keys: [k]\n  weight: yes", "line 3: a.weight is True: use a number"),
    ("a:\n  api_keys: [k]\n  requests_per_minute: many", "a.requests_per_minute is 'many': use a number of at least 1"),
    ("a:\n  api_keys: [k]\n  tokens_per_minute: -1", "a.tokens_per_minute is -1: use a number of at least 1, or leave"),
    ("a:\n  api_keys: [k]\n  max_concurrent_requests: 1.5", "a.max_concurrent_requests is 1.5: use a whole number"),
    ("a:\n  api_keys: [k]\n  priority: high", "a.priority is 'high': use a whole number; smaller goes first"),
    ("a b:\n  api_keys: [k]", "name is 'a b': use up to 64 letters"),
    ("default:\n  api_keys: [k]", "default.api_keys is '...': its keys are those of --api-key"),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_told_with_its_place_and_a_remedy(file: Path, text: str, message: str):
    file.write_text(text)
    with pytest.raises(ParameterError) as caught:
        ServeArgs(tenants=str(file), api_key=["own"])
    assert message in str(caught.value) and "tenants.yaml" in str(caught.value)


def test_no_error_tells_a_key(file: Path):
    for wrong in ("api_keys: [sk-secret, sk-secret]", "api_keys: {sk-secret: 1}", "api_keys: [' sk-secret']",
                  "api_key: sk-secret"):  # fmt: skip
        file.write_text(f"a:\n  {wrong}")
        with pytest.raises(ParameterError) as caught:
            read_tenants(str(file))
        assert "secret" not in str(caught.value)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ParameterError, match=r"cannot be read: No such file.*nowhere.yaml"):
        ServeArgs(tenants="nowhere.yaml")


# -- quotas ------------------------------------------------------------------------------------------------------------


def test_a_bucket_holds_a_minute_refills_steadily_and_may_be_overdrawn():
    bucket = Bucket(60, 100.0)
    bucket.take(60, 100.0)
    assert bucket.level(100.0) == 0 and bucket.wait(1, 100.0) == pytest.approx(1)
    assert bucket.level(130.0) == pytest.approx(30)
    bucket.take(90, 130.0)
    assert bucket.level(130.0) == pytest.approx(-60) and bucket.wait(1, 130.0) == pytest.approx(61)
    assert bucket.level(1000.0) == 60
    bucket.take(20, 1000.0)
    bucket.limit(30, 1000.0)
    assert bucket.level(1000.0) == pytest.approx(10)  # 20 are used


def test_over_minutes_a_quota_is_exact_whatever_requests_use():
    account, now, used = Account(Tenant("a", ("k",), tokens_per_minute=600), 0.0), 0.0, 0
    while now < 3600:
        try:
            account.check(now)
        except ServeError as error:
            now += int(error.headers["Retry-After"])
            continue
        account.open(now)
        account.use(70, 900, now)
        account.close(now)
        used += 970
    assert used == pytest.approx(600 * 60, rel=0.05)
    assert account.rejected["tokens"] > 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.12, "120ms"), (1, "1s"), (1.5, "1.5s"), (59.25, "59.25s"), (360, "6m0s")]
)
def test_times_are_written_as_openai_does(seconds: float, text: str):
    assert duration(seconds) == text


def test_waiting_is_told_in_whole_seconds():
    assert [whole_seconds(each) for each in (0, 0.2, 1.2, 59.5, 1e9)] == [1, 1, 2, 60, 60]


# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_key_tells_whose_a_request_is_and_nobody_else_gets_in(file: Path):
    file.write_text(TWO)

    async def main() -> None:
        async with serving(tenants=str(file), api_key=["own"]) as site:
            for key in (None, "sk-four", "", "sk-one sk-two"):
                assert (await site.ask([1], key)).status_code == 401
            for key in ("sk-one", "sk-two", "sk-three", "own"):
                assert (await site.ask([1, 2], key, max_tokens=3)).status_code == 200
            answer = await site.client.post("/v1/completions", json={"prompt": [1]}, headers={"x-api-key": "sk-two"})
            assert answer.status_code == 200
            assert (await site.client.get("/v1/models")).status_code == 401
            accounts = site.admission.accounts
            assert {name: each.num_requests for name, each in accounts.items()} == {
                "search": 3,
                "batch": 1,
                "default": 1,
            }

    asyncio.run(main())


def test_a_quota_of_requests(file: Path):
    file.write_text("a:\n  api_keys: [k]\n  requests_per_minute: 3\nb:\n  api_keys: [x]\n")

    async def main() -> None:
        async with serving(tenants=str(file)) as site:
            for left in (2, 1, 0):
                answer = await site.ask([1], "k", max_tokens=1)
                assert answer.status_code == 200
                assert answer.headers["x-ratelimit-limit-requests"] == "3"
                assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
                assert re.fullmatch(r"\d+(\.\d+)?s", answer.headers["x-ratelimit-reset-requests"])
            answer = await site.ask([1], "k")
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["code"]) == (429, "RateLimitError", 429)
            assert error["message"].startswith("Rate limit reached for a: 3 requests per minute. Please try again in ")
            assert 10 <= int(answer.headers["retry-after"]) <= 20
            assert answer.headers["x-ratelimit-remaining-requests"] == "0"
            answer = await site.client.post("/v1/messages", json={}, headers={"x-api-key": "k"})
            assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
            other = await site.ask([1], "x", max_tokens=1)  # has no quotas, and hears of none
            assert other.status_code == 200 and not [name for name in other.headers if "ratelimit" in name]
            assert (await site.metrics())['nanovllm:tenant_rejections_total{reason="requests",tenant="a"}'] == 2

    asyncio.run(main())


def test_a_quota_of_tokens_counts_prompts_and_outputs(file: Path):
    file.write_text("a:\n  api_keys: [k]\n  tokens_per_minute: 40\n")

    async def main() -> None:
        async with serving(tenants=str(file)) as site:
            answer = await site.ask([1] * 10, "k", max_tokens=20)  # 10 left
            assert answer.headers["x-ratelimit-limit-tokens"] == "40"
            assert (await site.ask([1] * 10, "k", max_tokens=20)).status_code == 200  # more than there is
            answer = await site.ask([1], "k")
            assert answer.status_code == 429 and 29 <= int(answer.headers["retry-after"]) <= 32
            assert "40 tokens per minute" in answer.json()["error"]["message"]

    asyncio.run(main())


def test_a_quota_of_requests_at_a_time(file: Path):
    file.write_text("a:\n  api_keys: [k]\n  max_concurrent_requests: 2\n")

    async def main() -> None:
        async with serving(tenants=str(file)) as site:
            tasks = [site.start([1], "k", max_tokens=100) for _ in range(2)]
            await site.until(lambda: site.admission.accounts["a"].num_calls == 2)
            answer = await site.ask([1], "k")
            assert answer.status_code == 429 and "2 requests at a time" in answer.json()["error"]["message"]
            tasks[0].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert (await site.ask([1], "k", max_tokens=1)).status_code == 200

    asyncio.run(main())


def test_what_is_refused_for_a_full_server_costs_no_quota(file: Path):
    file.write_text("a:\n  api_keys: [k]\n  requests_per_minute: 2\nb:\n  api_keys: [x]\n")

    async def main() -> None:
        async with serving(tenants=str(file), max_num_queued_reqs=1) as site:
            task = site.start([1], "x", max_tokens=100)
            await site.until(lambda: site.admission.num_places == 1)
            for _ in range(5):
                assert (await site.ask([1], "k")).status_code == 503
            await task
            assert (await site.ask([1], "k", max_tokens=1)).status_code == 200
            assert (await site.metrics())['nanovllm:tenant_rejections_total{reason="queue",tenant="a"}'] == 5

    asyncio.run(main())


def test_usage_is_in_the_metrics_and_nothing_a_client_sends_becomes_a_label(file: Path):
    file.write_text("a:\n  api_keys: [k]\nb:\n  api_keys: [x]\n")

    async def main() -> None:
        async with serving(tenants=str(file), engine={"max_num_seqs": 2}, executor={"seconds": 0.005}) as site:
            await site.ask([[1] * 5, [2] * 5], "k", max_tokens=7)
            await site.ask([3] * 4, "x", max_tokens=6, n=2, temperature=1.0, user="somebody")
            await site.ask([3], "nobody")
            tasks = [site.start([4], "k", max_tokens=100) for _ in range(2)]
            await site.until(lambda: site.llm.stats.tenants == {"a": (2, 0)})
            tasks.append(site.start([4], "x", max_tokens=100))
            await site.until(lambda: site.llm.stats.tenants == {"a": (2, 0), "b": (0, 1)})
            found = await site.metrics()
            for name, a, b in (("requests_total", 3, 2), ("prompt_tokens_total", 12, 5), ("requests_running", 2, 0),
                               ("generation_tokens_total", 14, 12), ("requests_waiting", 0, 1)):  # fmt: skip
                got = [found[f'nanovllm:tenant_{name}{{tenant="{tenant}"}}'] for tenant in ("a", "b", "default")]
                assert got == [a, b, 0], name
            labels = {value for name in found for value in re.findall(r'tenant="(.*?)"', name)}
            assert labels == {"a", "b", "default"}
            await asyncio.gather(*tasks)
            await site.idle()
            assert site.llm.stats.tenants == {}

    asyncio.run(main())


def test_tenants_share_the_engine(file: Path):
    """A crowd of one tenant is there first; the other one's request is answered among the first nonetheless."""
    file.write_text("crowd:\n  api_keys: [k]\nguest:\n  api_keys: [x]\n  weight: 4\n")

    async def main() -> None:
        async with serving(tenants=str(file), engine={"max_num_seqs": 2, "max_model_len": 60}) as site:
            order: list[str] = []

            async def ask(key: str, name: str) -> None:
                assert (await site.ask([5, 6], key, max_tokens=10)).status_code == 200
                order.append(name)

            crowd = [asyncio.create_task(ask("k", "crowd")) for _ in range(30)]
            await site.until(lambda: site.llm.stats.num_waiting >= 20)
            assert {flow.tenant: flow.weight for flow in site.scheduler.waiting.flows()} == {"crowd": 1}
            before = len(order)
            await ask("x", "guest")
            assert order.index("guest") - before <= 10
            await asyncio.gather(*crowd)

    asyncio.run(main())


def test_priorities_of_tenants(file: Path):
    file.write_text("a:\n  api_keys: [k]\n  priority: 5\n")

    async def main() -> None:
        async with serving(tenants=str(file), engine={"policy": "priority"}, executor={"seconds": 0.01}) as site:
            for asked, want in ((0, 5), (3, 8)):
                task = site.start([1], "k", max_tokens=20, priority=asked)
                await site.until(lambda: site.scheduler.running)
                assert [request.key[0] for request in site.scheduler.running] == [want]
                await task
            answer = await site.ask([1], "k", priority=-1)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "priority"

    asyncio.run(main())

    async def without() -> None:
        async with serving(tenants=str(file)):
            pass

    with pytest.raises(ParameterError, match=r"a.priority is 5: start the server with --scheduling-policy priority"):
        asyncio.run(without())


# -- the file is read again --------------------------------------------------------------------------------------------


def test_reading_the_file_again_changes_keys_and_quotas_and_keeps_what_was_used(file: Path):
    file.write_text("a:\n  api_keys: [k]\n  requests_per_minute: 4\ngone:\n  api_keys: [g]\n")

    async def main() -> None:
        async with serving(tenants=str(file)) as site:
            for _ in range(3):
                await site.ask([1], "k", max_tokens=1)
            running = site.start([1], "g", max_tokens=60)
            await site.until(lambda: site.admission.num_places == 1)
            file.write_text("a:\n  api_keys: [new]\n  requests_per_minute: 5\nb:\n  api_keys: [k]\n  weight: 3\n")
            site.admission.reload()
            assert (await site.ask([1], "g")).status_code == 401
            assert (await site.ask([1], "new", max_tokens=1)).headers["x-ratelimit-remaining-requests"] == "1"
            assert (await site.ask([1], "k", max_tokens=1)).status_code == 200
            assert site.admission.accounts["b"].num_requests == 1
            assert (await running).status_code == 200  # requests under way are not touched
            file.write_text("a:\n  api_keys: [other]\n  weight: none\n")
            site.admission.reload()  # a fault: all stays as it was
            assert set(site.admission.accounts) == {"default", "a", "b"}
            assert (await site.ask([1], "k", max_tokens=1)).status_code == 200
            assert (await site.ask([1], "other")).status_code == 401

    asyncio.run(main())


# -- a real server -----------------------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "Count to a hundred."}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    file = tmp_path_factory.mktemp("tenants") / "tenants.yaml"
    file.write_text(
        "a:\n  api_keys: [k]\n  requests_per_minute: 1000\none:\n  api_keys: [x]\n  max_concurrent_requests: 1\n"
    )
    with served("--tenants", str(file), "--max-model-len", "2k") as running:
        yield running, file


def test_a_signal_has_the_file_read_again(server: tuple[Served, Path]):
    running, file = server
    old = file.read_text()
    headers = {"Authorization": "Bearer later"}
    assert running.client.get("/v1/models", headers=headers).status_code == 401
    file.write_text(old + "later:\n  api_keys: [later]\n")
    running.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 20
    while running.client.get("/v1/models", headers=headers).status_code == 401:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    file.write_text("nonsense")
    running.process.send_signal(signal.SIGHUP)
    while "The tenants stay as they were" not in running.log:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert running.client.get("/v1/models", headers=headers).status_code == 200
    file.write_text(old)
    running.process.send_signal(signal.SIGHUP)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1900}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 1900}),
        ("/v1/responses", {"input": "Count to a hundred.", "max_output_tokens": 1900}),
    ],
)
def test_every_api_tells_that_time_is_up(server: tuple[Served, Path], path: str, fields: dict[str, Any]):
    running, _ = server
    headers = {"x-api-key": "k", "X-Request-Timeout": "0.25"}
    body = {**fields, "ignore_eos": True}
    answer = running.post(path, body, headers=headers)
    assert answer.status_code == 504, answer.text
    kind = "timeout_error" if path == "/v1/messages" else "RequestTimeoutError"
    assert answer.json()["error"]["type"] == kind and answer.headers["x-ratelimit-limit-requests"] == "1000"
    with running.client.stream("POST", path, json={**body, "stream": True}, headers=headers) as stream:
        text = stream.read().decode()
    if stream.status_code == 200:  # on a machine that does much else, time may be up before the first token
        data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ") and "{" in line]
        last = json.loads(data[-1])
        error = last["response"]["error"] if path == "/v1/responses" else last["error"]
        assert "did not end in the time it had" in error["message"]
    running.wait_until_idle()


def test_a_response_in_the_background_counts_until_it_has_ended(server: tuple[Served, Path]):
    running, _ = server
    headers = {"Authorization": "Bearer x"}
    body = {"input": "Count to a hundred.", "max_output_tokens": 1500, "ignore_eos": True}
    queued = running.ask("/v1/responses", {**body, "background": True}, headers=headers)
    chat = {"messages": MESSAGES, "max_tokens": 2}
    assert running.post("/v1/chat/completions", chat, headers=headers).status_code == 429
    running.ask(f"/v1/responses/{queued['id']}/cancel", {}, headers=headers)
    assert running.post("/v1/chat/completions", chat, headers=headers).status_code == 200
