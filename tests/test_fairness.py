"""Tenants share the engine in proportion to their weights when it is overloaded; one tenant is served as ever."""

from __future__ import annotations

from collections import Counter
from itertools import count
from typing import Any

import pytest
from fake_executor import FakeExecutor, engine_config, make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine import scheduler as scheduler_module
from nanovllm.engine.core import EngineCore
from nanovllm.engine.fair_queue import GENERATED, FairQueue
from nanovllm.engine.invariants import InvariantChecker
from nanovllm.engine.request import Request


class Site:
    """An engine without a model, and tenants that send requests to it. Long simulations are checked now and then."""

    def __init__(self, num_blocks: int = 500, **options: Any) -> None:
        self.core = EngineCore(engine_config(**options), FakeExecutor(num_blocks=num_blocks))
        self.checker = InvariantChecker(self.core.scheduler)
        self.service: Counter[str] = Counter()  # as the queue counts it
        self.done: list[str] = []
        self.first: list[str] = []  # in the order of their first tokens
        self._numbers = count()
        self._owner: dict[str, Request] = {}

    def send(self, tenant: str, prompt: int = 8, output: int = 8, weight: float = 1.0, priority: int = 0) -> str:
        number = next(self._numbers)
        name = f"{tenant}.{number}"
        tokens = [number // 97 + 3, number % 97 + 3, *range(5, 3 + prompt)][:prompt]
        request = make_request(name, tokens, output, tenant=tenant, weight=weight, max_model_len=100_000)
        self._owner[name] = request
        self.core.add(request, priority)
        return name

    def step(self) -> None:
        for output in self.core.step():
            request = self._owner[output.request_id]
            if request.num_output_tokens == 1:
                self.first.append(output.request_id)
                self.service[request.tenant] += request.num_prompt_tokens
            self.service[request.tenant] += GENERATED * len(output.new_token_ids)
            if output.finish_reason:
                self.done.append(output.request_id)

    def waiting(self, tenant: str) -> int:
        return sum(flow.num_waiting for flow in self.core.scheduler.waiting.flows() if flow.tenant == tenant)

    def flood(self, steps: int, *tenants: dict[str, Any], depth: int = 10) -> None:
        """Steps in which each of these tenants always has requests waiting."""
        for _ in range(steps):
            for each in tenants:
                while self.waiting(each["tenant"]) < depth:
                    self.send(**each)
            self.step()
        self.checker.check()

    def drain(self) -> None:
        while self.core.has_work:
            self.step()
        self.checker.idle()


def shares(service: Counter[str]) -> dict[str, float]:
    total = sum(service.values())
    return {tenant: amount / total for tenant, amount in service.items()}


# -- under overload ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [1, 2])
def test_service_is_in_proportion_to_the_weights_whatever_the_lengths(in_flight: int):
    site = Site(in_flight=in_flight, prefix_caching=False)
    tenants = [
        {"tenant": "short", "prompt": 4, "output": 2, "weight": 1},
        {"tenant": "long", "prompt": 50, "output": 30, "weight": 2},
        {"tenant": "talks", "prompt": 3, "output": 60, "weight": 5},
    ]
    site.flood(100, *tenants)
    site.service.clear()
    site.flood(900, *tenants)
    found = shares(site.service)
    for each in tenants:
        assert found[each["tenant"]] == pytest.approx(each["weight"] / 8, rel=0.1), found


def test_the_number_of_requests_buys_nothing():
    site = Site(prefix_caching=False)
    for _ in range(500):
        site.send("crowd")
    for _ in range(50):
        site.send("few")
    site.flood(100)
    assert shares(site.service)["few"] == pytest.approx(0.5, abs=0.05)


def test_tenants_that_wait_never_drift_apart():
    """The bound of the virtual token counter: a prompt, and what all rows of a tenant may generate to their ends."""
    site = Site(max_num_seqs=4, prefix_caching=False)
    a = {"tenant": "a", "prompt": 30, "output": 5}
    b = {"tenant": "b", "prompt": 5, "output": 20}
    bound = 30 + GENERATED * 20 * 4
    for _ in range(300):
        site.flood(1, a, b, depth=3)
        flows = {flow.tenant: flow.virtual for flow in site.core.scheduler.waiting.flows()}
        assert abs(flows["a"] - flows["b"]) <= bound


@pytest.mark.parametrize("num_blocks", [500, 60])  # plenty, and so few that requests are preempted
def test_nobody_starves_behind_a_flood(num_blocks: int):
    site = Site(num_blocks, max_num_seqs=4, prefix_caching=False)
    flood = {"tenant": "flood", "prompt": 20, "output": 40}
    site.flood(50, flood, depth=100)
    for _ in range(5):
        name, begun = site.send("guest", 20, 40), len(site.done)
        for _ in range(400):
            if name in site.done:
                break
            site.flood(1, flood, depth=100)
        assert name in site.done
        assert len(site.done) - begun <= 12  # in a queue by arrival, 100 would end before it
    assert num_blocks == 500 or site.core.scheduler.num_preemptions > 0


def test_who_was_away_has_no_credit():
    site = Site(prefix_caching=False)
    a, b = {"tenant": "a"}, {"tenant": "b"}
    site.flood(50, a, b)
    site.flood(300, a)  # b has gone; its queue empties
    assert site.waiting("b") == 0
    site.service.clear()
    site.flood(200, a, b)
    assert shares(site.service)["b"] == pytest.approx(0.5, abs=0.06)


def test_what_nobody_else_wanted_is_not_held_against_who_used_it():
    site = Site(prefix_caching=False)
    for _ in range(300):  # two tenants, one with ten times the work, and room for both
        if not site.core.scheduler.running:
            for _ in range(5):
                site.send("a", 10, 20)
            site.send("b", 5, 10)
        site.step()
    site.service.clear()
    site.flood(200, {"tenant": "a"}, {"tenant": "b"})
    assert shares(site.service)["a"] == pytest.approx(0.5, abs=0.06)


def test_a_smaller_priority_goes_before_any_share():
    site = Site(policy="priority", max_num_seqs=2)
    for _ in range(20):
        site.send("late", priority=1, weight=1000)
        site.send("early")
    site.drain()
    assert [name.split(".")[0] for name in site.first[:20]] == ["early"] * 20


def test_tenants_of_one_priority_share_whatever_others_do_at_another():
    site = Site(policy="priority", prefix_caching=False)
    site.flood(300, {"tenant": "a", "priority": 1}, {"tenant": "b", "priority": 1, "weight": 3})
    assert shares(site.service)["b"] == pytest.approx(0.75, abs=0.06)
    site.service.clear()
    site.flood(100, {"tenant": "a", "priority": 0}, {"tenant": "b", "priority": 1})
    assert shares(site.service)["a"] > 0.9


def test_a_request_that_has_begun_keeps_its_place():
    site = Site(24, max_num_seqs=3, prefix_caching=False)
    for _ in range(3):
        site.send("a", 4, 60)
    while not site.core.scheduler.num_preemptions:
        site.step()
    for _ in range(20):
        site.send("b", 4, 4)  # b has had no service; but a's request was there before
    preempted = site.core.scheduler.waiting.peek()
    assert preempted is not None and preempted.tenant == "a"
    site.drain()


# -- the queue itself -------------------------------------------------------------------------------------------------


def test_tenants_are_forgotten_when_they_cannot_matter_any_more():
    site = Site()
    for number in range(200):
        site.send(f"t{number}")
        site.step()
        site.step()
        assert len(list(site.core.scheduler.waiting.flows())) <= 12
    site.drain()
    assert not list(site.core.scheduler.waiting.flows())


def test_the_head_of_the_queue_is_shown_in_the_order_of_being_taken():
    site = Site(policy="priority", max_num_seqs=1, prefix_caching=False)
    for _ in range(6):
        site.send("a", output=1)
    for _ in range(6):
        site.send("b", output=1, weight=2)
    site.send("c", output=1, priority=-1)
    shown = [request.request_id for request in site.core.scheduler.waiting.first(20)]
    assert shown[0] == "c.12" and len(shown) == 13
    assert site.core.scheduler.waiting.first(3) == site.core.scheduler.waiting.first(20)[:3]
    for request in list(site.core.scheduler.waiting):  # outputs of no length: what is shown is exact
        request.params.max_tokens = 1
    site.drain()
    assert [name.split(".")[0] for name in site.first] == [name.split(".")[0] for name in shown]


# -- any history ------------------------------------------------------------------------------------------------------

events = st.lists(
    st.fixed_dictionaries(
        {
            "gap": st.integers(0, 3),
            "prompt": st.lists(st.integers(1, 3), min_size=1, max_size=30),
            "max_tokens": st.integers(1, 25),
            "forks": st.sampled_from([0, 0, 1, 3]),
            "priority": st.integers(-1, 1),
            "tenant": st.sampled_from(["", "a", "b", "c"]),
            "weight": st.sampled_from([0.5, 1.0, 3.0]),
            "abort_after": st.one_of(st.none(), st.none(), st.integers(0, 15)),
        }
    ),
    min_size=1,
    max_size=16,
)
setups = st.fixed_dictionaries(
    {
        "in_flight": st.sampled_from([1, 2]),
        "max_num_batched_tokens": st.sampled_from([8, 64]),
        "max_num_seqs": st.sampled_from([1, 3, 8]),
        "policy": st.sampled_from(["fcfs", "priority"]),
        "block_size": st.sampled_from([1, 4]),
        "prefix_caching": st.booleans(),
    }
)


def run(
    setup: dict[str, Any], slack: int, history: list[dict[str, Any]], tenants: bool
) -> tuple[EngineCore, list[Any]]:
    """Play a history; the engine, and what each of its steps computed."""
    core = EngineCore(engine_config(**setup), FakeExecutor(num_blocks=-(-60 // setup["block_size"]) + 1 + slack))
    core.checker = InvariantChecker(core.scheduler)
    got: dict[str, list[int]] = {}
    want: dict[str, list[int]] = {}
    aborts: dict[int, str] = {}
    clock = 0

    def step() -> None:
        nonlocal clock
        for output in core.step():
            got.setdefault(output.request_id, []).extend(output.new_token_ids)
        clock += 1
        if clock in aborts:
            core.finish([aborts[clock]], "abort")
            core.checker.check()  # type: ignore[union-attr]

    for number, event in enumerate(history):
        for _ in range(event["gap"]):
            step()
        owner = {"tenant": event["tenant"], "weight": event["weight"]} if tenants else {}
        family = [
            make_request(f"{number}.{i}", event["prompt"], event["max_tokens"], seed=9 * number + i, **owner)
            for i in range(1 + event["forks"])
        ]
        core.add(family[0], event["priority"] if setup["policy"] == "priority" else 0, family[1:])
        for member in family:
            positions = range(len(event["prompt"]), member.max_total)
            want[member.request_id] = [core.executor.token(member.seed, each) for each in positions]  # type: ignore[attr-defined]
        if event["abort_after"] is not None:
            aborts[clock + 1 + event["abort_after"]] = family[-1].request_id
            want.pop(family[-1].request_id)
    for _ in range(5000):
        if not core.has_work:
            break
        step()
    core.checker.idle()
    assert {name: got.get(name) for name in want} == want
    return core, [(plan.rows, plan.num_computed, plan.num_new, plan.sampled) for plan in core.executor.plans]  # type: ignore[attr-defined]


@settings(max_examples=60)
@given(setup=setups, slack=st.integers(0, 30), history=events)
def test_any_history_of_tenants_keeps_the_invariants_and_yields_every_token(
    setup: dict[str, Any], slack: int, history: list[dict[str, Any]]
):
    run(setup, slack, history, tenants=True)


class ByKey(FairQueue):
    """A queue in the order of keys, and nothing else: what there was before there were tenants."""

    def peek(self) -> Request | None:
        return min(self, key=lambda request: request.key, default=None)

    def take(self, request: Request) -> None:
        flow = request.flow
        assert flow is not None
        flow.heap.remove((request.key, request))
        self._leave(flow)

    def started(self, request: Request) -> None:
        super().started(request)
        request.place = (request.key[0], 0.0, *request.key[1:])

    contended = False  # type: ignore[assignment]


@settings(max_examples=60)
@given(setup=setups, slack=st.integers(0, 30), history=events)
def test_with_one_tenant_every_step_is_as_in_the_order_of_arrival(
    setup: dict[str, Any], slack: int, history: list[dict[str, Any]]
):
    _, plans = run(setup, slack, history, tenants=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_module, "FairQueue", ByKey)
        assert run(setup, slack, history, tenants=False)[1] == plans
