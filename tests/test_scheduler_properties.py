"""Random arrivals, lengths, aborts, forks and tiny caches: the invariants hold and every output is right."""

from __future__ import annotations

import contextlib
from typing import Any

from fake_executor import FakeExecutor, engine_config, make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.core import EngineCore
from nanovllm.engine.invariants import InvariantChecker
from nanovllm.engine.suspects import RETRIES
from nanovllm.errors import StepError

arrivals = st.lists(
    st.fixed_dictionaries(
        {
            "gap": st.integers(0, 4),  # steps before it arrives
            "shared": st.integers(0, 20),  # tokens of a common prefix
            "own": st.lists(st.integers(1, 3), min_size=1, max_size=20),
            "max_tokens": st.integers(1, 30),
            "forks": st.integers(0, 3),
            "priority": st.integers(-2, 2),
            "pooling": st.sampled_from([None, None, None, "last", "mean"]),
            "poison": st.one_of(st.none(), st.none(), st.integers(0, 30)),  # position at which its steps fail
            "abort_after": st.one_of(st.none(), st.none(), st.integers(0, 20)),  # steps after its arrival
        }
    ),
    min_size=1,
    max_size=14,
)

setups = st.fixed_dictionaries(
    {
        "in_flight": st.sampled_from([1, 2]),
        "max_num_batched_tokens": st.sampled_from([8, 11, 64]),
        "max_num_seqs": st.sampled_from([1, 3, 8]),
        "policy": st.sampled_from(["fcfs", "priority"]),
        "threshold": st.sampled_from([0, 5]),
        "block_size": st.sampled_from([1, 4, 16]),
        "prefix_caching": st.booleans(),
    }
)


# Steps that fail by themselves, no more than a request is retried; or requests that make them fail.
faults = st.one_of(st.just(frozenset()), st.frozensets(st.integers(0, 60), max_size=RETRIES), st.just("poison"))


@settings(max_examples=250)
@given(setup=setups, slack=st.integers(0, 30), events=arrivals, faulty=faults)
def test_any_history_keeps_the_invariants_and_yields_every_token(
    setup: dict, slack: int, events: list[dict], faulty: Any
):
    longest = -(-70 // setup["block_size"])
    executor = FakeExecutor(num_blocks=longest + 1 + slack)
    if faulty != "poison":
        executor.failing_steps = faulty
    core = EngineCore(engine_config(**setup), executor)
    core.checker = InvariantChecker(core.scheduler)
    want: dict[str, list[int]] = {}
    got: dict[str, list[int]] = {}
    failed: set[str] = set()
    poisoned: dict[str, list[int]] = {}  # what each yields before it fails
    aborts: dict[int, list[str]] = {}
    clock = 0

    def step() -> None:
        nonlocal clock
        with contextlib.suppress(StepError):
            for output in core.step():
                new = output.new_token_ids if output.pooled is None else output.pooled.tolist()
                got.setdefault(output.request_id, []).extend(new)
                if output.finish_reason == "error":
                    failed.add(output.request_id)
        clock += 1
        for name in aborts.pop(clock, []):
            core.finish([name], "abort")
            core.checker.check()  # type: ignore[union-attr]

    for number, event in enumerate(events):
        for _ in range(event["gap"]):
            step()
        prompt = [1 + i % 3 for i in range(event["shared"])] + event["own"]
        pooling = event["pooling"]
        family = [
            make_request(
                f"{number}.{i}", prompt, 1 if pooling else event["max_tokens"], seed=100 * number + i, pooling=pooling
            )
            for i in range(1 if pooling else 1 + event["forks"])
        ]
        core.add(family[0], event["priority"] if setup["policy"] == "priority" else 0, family[1:])
        for index, member in enumerate(family):
            at = event["poison"]
            if faulty == "poison" and at is not None and (at < member.max_total - 1 or (pooling and at < len(prompt))):
                executor.poison[member.seed] = at
                poisoned[member.request_id] = [executor.token(member.seed, p) for p in range(len(prompt), at + 1)]
                if pooling:
                    poisoned[member.request_id] = []
            if event["abort_after"] is not None and index % 2 == 0:
                aborts.setdefault(clock + 1 + event["abort_after"] + index, []).append(member.request_id)
            elif pooling:
                want[member.request_id] = [member.seed, len(prompt)]
            else:
                want[member.request_id] = [executor.token(member.seed, p) for p in range(len(prompt), member.max_total)]
    for _ in range(5000):
        if not core.has_work:
            break
        step()
    core.checker.idle()
    assert {name: got.get(name) for name in want if name not in poisoned} == {
        name: tokens for name, tokens in want.items() if name not in poisoned
    }
    assert failed <= set(poisoned)
    assert all(name in failed and got[name] == tokens for name, tokens in poisoned.items() if name in want)
