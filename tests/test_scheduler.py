"""Scheduling, preemption and the life of a request, one behaviour per test; the invariant checker watches each step."""

from __future__ import annotations

import pytest
from fake_executor import FakeExecutor, engine_config, make_request

from nanovllm.engine.core import EngineCore
from nanovllm.engine.invariants import InvariantChecker
from nanovllm.engine.plan import StepPlan, StepResult
from nanovllm.engine.request import Request
from nanovllm.engine.scheduler import Scheduler
from nanovllm.errors import ParameterError
from nanovllm.sampling_params import RepetitionDetectionParams, SamplingParams


def make_core(num_blocks: int = 64, **options: object) -> EngineCore:
    core = EngineCore(engine_config(**options), FakeExecutor(num_blocks))  # type: ignore[arg-type]
    core.checker = InvariantChecker(core.scheduler)
    return core


def run(core: EngineCore, limit: int = 1000) -> dict[str, tuple[list[int], str | None]]:
    """Run to the end: request id -> (tokens, finish reason)."""
    found: dict[str, tuple[list[int], str | None]] = {}
    for _ in range(limit):
        if not core.has_work:
            assert core.checker is not None
            core.checker.idle()
            return found
        for output in core.step():
            tokens, _ = found.get(output.request_id, ([], None))
            found[output.request_id] = (tokens + output.new_token_ids, output.finish_reason)
    raise AssertionError("the engine does not come to an end")


def expected(core: EngineCore, request: Request) -> list[int]:
    start, executor = request.num_prompt_tokens, core.executor
    return [executor.token(request.seed, position) for position in range(start, request.max_total)]  # type: ignore[attr-defined]


def plans(core: EngineCore) -> list[StepPlan]:
    return core.executor.plans  # type: ignore[attr-defined]


def computed(core: EngineCore) -> int:
    return sum(plan.num_tokens for plan in plans(core))


# -- the unified step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [1, 2])
def test_requests_get_their_own_tokens_in_order(in_flight: int):
    core = make_core(in_flight=in_flight)
    requests = [make_request(str(i), list(range(1, 3 + 5 * i)), 4 + i, seed=i) for i in range(6)]
    for request in requests:
        core.add(request)
    found = run(core)
    assert found == {r.request_id: (expected(core, r), "length") for r in requests}


def test_a_long_prompt_is_cut_into_chunks_of_the_budget():
    core = make_core(max_num_batched_tokens=10)
    core.add(make_request("a", list(range(1, 26)), 2))
    run(core)
    assert [plan.num_new for plan in plans(core)] == [[10], [10], [5], [1]]
    assert [len(plan.sampled) for plan in plans(core)] == [0, 0, 1, 1]


def test_decodes_are_served_in_every_step_while_a_long_prompt_arrives():
    # field_lessons 5.10: the running request gets one token in each step of the prompt.
    core = make_core(num_blocks=128, max_num_batched_tokens=8, max_model_len=256)
    core.add(make_request("short", [1, 2], 30, max_model_len=256))
    core.step()
    core.add(make_request("long", [3] * 100, 2, max_model_len=256))
    steps = 0
    while "long" in core.scheduler.requests:
        outputs = core.step()
        if "short" in core.scheduler.requests:
            steps += 1
            assert "short" in [output.request_id for output in outputs]
    assert steps > 10


def test_decodes_come_before_chunks_of_earlier_requests_too():
    core = make_core(max_num_batched_tokens=8, threshold=4, max_num_seqs=3)
    core.add(make_request("long", [3] * 40, 2))
    core.add(make_request("short", [1, 2], 20))
    core.step()
    for _ in range(5):
        core.step()
        plan = plans(core)[-1]
        assert [r.request_id for r in plan.requests] == ["short", "long"]
        assert plan.num_new == [1, 4]


def test_a_long_prefill_is_limited_by_its_threshold_so_that_others_start_beside_it():
    core = make_core(max_num_batched_tokens=16, threshold=4)
    core.add(make_request("a", [1] * 20, 1))
    core.add(make_request("b", [2] * 20, 1))
    core.step()
    assert plans(core)[0].num_new == [4, 4]


def test_without_chunked_prefill_a_prompt_is_computed_in_one_step():
    core = make_core(max_num_batched_tokens=128, chunked=False)
    for i in range(4):
        core.add(make_request(str(i), [i + 1] * 50, 3, seed=i))
    run(core)
    assert all(n in (1, 50) for plan in plans(core) for n in plan.num_new)


def test_max_num_seqs_bounds_a_step():
    core = make_core(max_num_seqs=2)
    for i in range(5):
        core.add(make_request(str(i), [1, 2, 3], 3, seed=i))
    assert len(run(core)) == 5
    assert max(len(plan.rows) for plan in plans(core)) == 2


def test_the_batch_order_is_deterministic():
    def trace() -> list[list[str]]:
        core = make_core(num_blocks=20, max_num_seqs=5)
        for i in range(12):
            core.add(make_request(str(i), [i % 3 + 1] * (3 + i), 9, seed=i))
        run(core)
        return [[r.request_id for r in plan.requests] for plan in plans(core)]

    assert trace() == trace()


def test_a_plan_is_made_while_another_is_under_way():
    core = make_core(in_flight=2)
    core.add(make_request("a", [1, 2, 3], 5))
    core.step()
    assert [plan.num_computed for plan in plans(core)] == [[0], [3]]  # the second, before the first token was known


# -- limits -----------------------------------------------------------------------------------------------------------


def test_generation_stops_at_the_context_length():
    core = make_core(max_model_len=10)
    core.add(make_request("a", [1] * 7, 50, max_model_len=10))
    core.add(make_request("b", [1] * 9, 50, max_model_len=10))
    found = run(core)
    assert len(found["a"][0]) == 3 and found["a"][1] == "length"
    assert len(found["b"][0]) == 1 and found["b"][1] == "length"


def test_a_request_that_can_never_fit_is_refused_at_once():
    # field_lessons 5.8
    core = make_core(num_blocks=5, block_size=4)
    with pytest.raises(ParameterError, match=r"18 tokens need 5 blocks of the KV cache, which has 4"):
        core.add(make_request("a", [1] * 10, 8))
    core.add(make_request("b", [1] * 10, 7))  # 17 tokens: the last is never written
    assert run(core)["b"][1] == "length"


def test_an_id_in_use_is_refused():
    core = make_core()
    core.add(make_request("a", [1], 2))
    with pytest.raises(ParameterError, match="under way"):
        core.add(make_request("a", [1], 2))
    assert len(run(core)) == 1


# -- prefix cache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [4 * 4 - 1, 4 * 4, 4 * 4 + 1])
def test_a_repeated_prompt_skips_compute_but_for_its_last_block(length: int):
    # field_lessons 5.3 and 5.5: prompts of N * block_size - 1, 0, +1 tokens.
    core = make_core()
    prompt = list(range(1, length + 1))
    core.add(make_request("a", prompt, 1))
    run(core)
    before = computed(core)
    again = make_request("b", prompt, 1)
    core.add(again)
    run(core)
    hit = (length - 1) // 4 * 4
    assert computed(core) - before == length - hit
    assert again.num_cached_tokens == hit


def test_two_equal_prompts_in_one_step_share_nothing_and_lose_nothing():
    # field_lessons 5.4
    core = make_core()
    for name in "ab":
        core.add(make_request(name, list(range(1, 13)), 6, seed=ord(name)))
    found = run(core)
    assert found["a"][0] != found["b"][0]


def test_equal_prompts_in_consecutive_steps_share_their_full_blocks():
    core = make_core()
    first = make_request("a", list(range(1, 15)), 6)
    core.add(first)
    core.step()
    second = make_request("b", list(range(1, 15)), 6)
    core.add(second)
    core.step()
    assert second.blocks[:3] == first.blocks[:3] and second.blocks[3] != first.blocks[3]
    run(core)


def test_generated_tokens_are_cached_too():
    core = make_core()
    request = make_request("a", [1, 2, 3], 10)
    core.add(request)
    run(core)
    follow = make_request("b", [*request.token_ids, 50], 1)
    core.add(follow)
    run(core)
    assert follow.num_cached_tokens == 12  # 13 tokens, of which the last was never computed


def test_only_computed_blocks_can_be_hit():
    # field_lessons 5.2: nothing of a prompt is found before its step has reported.
    core = make_core(max_num_batched_tokens=8)
    core.add(make_request("a", list(range(1, 30)), 1))
    plan = core.scheduler.schedule()
    assert plan is not None and not core.scheduler.kv.pool.cached
    core.scheduler.update(plan, StepResult([]))
    assert len(core.scheduler.kv.pool.cached) == 2


def test_an_aborted_prefill_leaves_no_false_hash():
    core = make_core(in_flight=1)
    core.add(make_request("a", list(range(1, 30)), 1))
    plan = core.scheduler.schedule()
    core.finish(["a"], "abort")
    assert plan is not None
    core.scheduler.update(plan, StepResult([5]))
    assert not core.scheduler.kv.pool.cached
    assert core.checker is not None
    core.checker.idle()


def test_salts_and_switches_keep_prompts_apart():
    for second, hit in (({"cache_salt": "x"}, 0), ({"cache_salt": "y"}, 8), ({}, 0)):
        core = make_core()
        core.add(make_request("a", list(range(1, 12)), 1, cache_salt="y"))
        run(core)
        other = make_request("b", list(range(1, 12)), 1, **second)
        core.add(other)
        run(core)
        assert other.num_cached_tokens == hit
    core = make_core(prefix_caching=False)
    for name in "ab":
        core.add(make_request(name, list(range(1, 12)), 1))
        run(core)
    assert computed(core) == 22 and not core.scheduler.kv.pool.cached


def test_a_request_that_wants_prompt_logprobs_reads_no_cache():
    core = make_core()
    core.add(make_request("a", list(range(1, 12)), 1))
    run(core)
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    core.add(Request("b", list(range(1, 12)), params, max_model_len=128))
    before = computed(core)
    run(core)
    assert computed(core) - before == 11


def test_the_prefix_cache_can_be_reset_only_when_nothing_runs():
    core = make_core()
    core.add(make_request("a", list(range(1, 12)), 3))
    core.step()
    assert not core.reset_prefix_cache()
    run(core)
    assert core.reset_prefix_cache()
    assert not core.scheduler.kv.pool.cached


# -- preemption -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_requests_resume_with_the_same_result(in_flight: int, prefix_caching: bool):
    # field_lessons 5.7
    core = make_core(num_blocks=12, in_flight=in_flight, prefix_caching=prefix_caching)
    requests = [make_request(str(i), [i + 1] * 9, 25, seed=i) for i in range(4)]
    for request in requests:
        core.add(request)
    found = run(core)
    assert core.scheduler.num_preemptions > 0
    for request in requests:
        assert found[request.request_id] == (expected(core, request), "length")


def test_the_last_to_arrive_is_preempted_first():
    core = make_core(num_blocks=9, prefix_caching=False)
    requests = [make_request(str(i), [i + 1] * 7, 20, seed=i) for i in range(3)]
    for request in requests:
        core.add(request)
    finished = list(run(core))
    assert requests[0].num_preemptions == 0 and requests[2].num_preemptions > 0
    assert finished[0] == "0"


def test_priority_decides_who_is_admitted_and_who_yields():
    core = make_core(num_blocks=9, policy="priority", max_num_seqs=2, prefix_caching=False)
    requests = {name: make_request(name, [ord(name)] * 7, 16, seed=ord(name)) for name in "abc"}
    for name, priority in (("a", 5), ("b", 1), ("c", 0)):
        core.add(requests[name], priority)
    core.step()
    assert [r.request_id for r in core.scheduler.running] == ["c", "b"]
    run(core)
    assert requests["c"].num_preemptions == 0


def test_a_priority_that_the_policy_would_ignore_is_refused():
    core = make_core(max_num_seqs=1)
    with pytest.raises(ParameterError, match="scheduling_policy='priority'"):
        core.add(make_request("a", [1, 2], 2), 5)
    for name in "bc":
        core.add(make_request(name, [1, 2], 2))
    assert list(run(core)) == ["b", "c"]


def test_prompt_logprobs_are_delivered_once_though_the_prompt_is_recomputed():
    request = make_request("a", list(range(1, 12)), 1)
    assert request.take_prompt_logprobs(0, [1, 2, 3, 4]) == [1, 2, 3, 4]  # type: ignore[list-item, comparison-overlap]
    assert request.take_prompt_logprobs(0, [1, 2, 3, 4, 5, 6]) == [5, 6]  # type: ignore[list-item, comparison-overlap]
    assert request.take_prompt_logprobs(6, [7, 8]) == [7, 8]  # type: ignore[list-item, comparison-overlap]


# -- forks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11])
def test_forks_share_the_prompt_and_compute_one_token_each(prefix_caching: bool, length: int):
    core = make_core(prefix_caching=prefix_caching)
    prompt = list(range(1, length + 1))
    family = [make_request(f"f{i}", prompt, 6, seed=i) for i in range(4)]
    core.add(family[0], forks=family[1:])
    found = run(core)
    for request in family:
        assert found[request.request_id] == (expected(core, request), "length")
    assert computed(core) == length + 3 + 4 * 5
    copies = sum(len(plan.copies) for plan in plans(core))
    assert copies == (3 if (length - 1) % 4 else 0)  # a partly filled block is copied, a full one shared


def test_forks_that_wait_for_their_prompt_hold_nobody_up():
    core = make_core(max_num_batched_tokens=32, threshold=4)
    forks = [make_request(f"f{i}", [1] * 40, 3) for i in range(2)]
    core.add(make_request("p", [1] * 40, 3), forks=forks)
    core.add(make_request("next", [5, 6], 3))
    core.step()
    assert [r.request_id for r in plans(core)[0].requests] == ["p", "next"]
    run(core)


def test_forks_outlive_their_parent():
    for reason in ("abort", "length"):
        core = make_core(max_num_batched_tokens=4)
        parent = make_request("p", list(range(1, 11)), 1 if reason == "length" else 8)
        forks = [make_request(f"f{i}", list(range(1, 11)), 5, seed=i) for i in range(2)]
        core.add(parent, forks=forks)
        core.step()
        if reason == "abort":
            core.finish(["p"], "abort")
        found = run(core)
        assert [found[f.request_id][0] for f in forks] == [expected(core, f) for f in forks]


def test_aborting_a_family_frees_everything_whatever_the_order():
    for order in (["p", "f0", "f1"], ["f1", "p", "f0"], ["f0", "f1", "p"]):
        core = make_core(max_num_batched_tokens=4)
        forks = [make_request(f"f{i}", list(range(1, 11)), 5) for i in range(2)]
        core.add(make_request("p", list(range(1, 11)), 5), forks=forks)
        core.step()
        core.finish(order, "abort")
        assert core.checker is not None
        core.checker.idle()


def test_a_held_request_keeps_its_blocks_until_its_forks_have_them():
    core = make_core(prefix_caching=False)
    parent = make_request("p", list(range(1, 11)), 1, held=True)
    core.add(parent)
    while core.has_work:
        core.step()
    assert len(parent.blocks) == 3
    children = [make_request(f"c{i}", [*parent.token_ids], 1, fork_of=parent, seed=i) for i in range(2)]
    for child in children:
        core.add(child)
    core.scheduler.release("p")
    assert parent.blocks
    before = computed(core)
    run(core)
    assert not parent.blocks and computed(core) - before == 2


def test_held_blocks_are_given_up_when_memory_is_short():
    core = make_core(num_blocks=5, prefix_caching=False)
    parent = make_request("p", list(range(1, 11)), 1, held=True)
    core.add(parent)
    while core.has_work:
        core.step()
    core.add(make_request("a", [5] * 9, 4))
    while core.has_work:
        core.step()
    assert not parent.blocks
    core.scheduler.release("p")
    assert core.checker is not None
    core.checker.idle()


# -- abort and stop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [1, 2])
def test_abort_in_every_state_frees_once_and_yields_nothing_more(in_flight: int):
    # field_lessons 5.11: waiting, mid-chunk, running, with a plan under way, unknown, twice.
    for steps in range(9):
        core = make_core(num_blocks=20, in_flight=in_flight, max_num_batched_tokens=8, max_num_seqs=2)
        for i in range(4):
            core.add(make_request(str(i), [i + 1] * 10, 6, seed=i))
        for _ in range(steps):
            core.step()
        gone = [r for r in ("0", "1", "3") if r in core.scheduler.requests]
        core.finish([*gone, "unknown"], "abort")
        core.finish(gone, "abort")
        assert core.checker is not None
        core.checker.check()
        found = run(core)
        assert not set(found) & set(gone)


def test_stop_rules_in_order():
    def stop(tokens_before: int, params: SamplingParams, eos: frozenset[int], token: int) -> tuple[str | None, object]:
        scheduler = Scheduler(engine_config().scheduler, 16, 4)
        request = Request(
            "a",
            [1, 2],
            params,
            max_model_len=10,
            eos_token_ids=eos,
            stop_token_ids=frozenset(params.stop_token_ids or ()),
        )
        request.token_ids += [9] * tokens_before
        scheduler.add(request)
        plan = scheduler.schedule()
        assert plan is not None
        (output,) = scheduler.update(plan, StepResult([token]))
        return output.finish_reason, output.stop_reason

    eos = frozenset({7})
    assert stop(0, SamplingParams(max_tokens=5), eos, 7) == ("stop", None)
    assert stop(0, SamplingParams(max_tokens=5, stop_token_ids=[8]), eos, 8) == ("stop", 8)
    assert stop(0, SamplingParams(max_tokens=5, stop_token_ids=[7]), eos, 7) == ("stop", None)  # EOS goes first
    assert stop(0, SamplingParams(max_tokens=1), eos, 7) == ("stop", None)  # and before length
    assert stop(0, SamplingParams(max_tokens=1), eos, 5) == ("length", None)
    assert stop(0, SamplingParams(max_tokens=5, min_tokens=2), eos, 7) == (None, None)
    assert stop(1, SamplingParams(max_tokens=5, min_tokens=2), eos, 7) == ("stop", None)
    assert stop(7, SamplingParams(max_tokens=None), frozenset(), 7) == ("length", None)  # the context is full
    detection = RepetitionDetectionParams(max_pattern_size=2, min_pattern_size=1, min_count=3)
    assert stop(2, SamplingParams(max_tokens=8, repetition_detection=detection), eos, 9) == ("repetition", None)
    assert stop(2, SamplingParams(max_tokens=8, repetition_detection=detection), eos, 8) == (None, None)


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_step_can_end_single_rows_as_complete_or_failed(in_flight: int):
    core = make_core(in_flight=in_flight)
    requests = [make_request(str(i), [i + 1] * 5, 9, seed=i) for i in range(3)]
    for request in requests:
        core.add(request)
    executor, submit = core.executor, core.executor.submit

    def judged(plan: StepPlan) -> object:
        handle, result = submit(plan), StepResult([])

        class Handle:
            def result(self) -> StepResult:
                nonlocal result
                result = handle.result()
                if plan.step == 2:  # the rows of requests 0 and 1
                    result.complete, result.failed = [0], {1: "no token is allowed"}
                return result

        return Handle()

    executor.submit = judged  # type: ignore[method-assign,assignment]
    tokens: dict[str, int] = {}
    ends: dict[str, tuple[str | None, object]] = {}
    while core.has_work:
        for output in core.step():
            tokens[output.request_id] = tokens.get(output.request_id, 0) + len(output.new_token_ids)
            ends[output.request_id] = output.finish_reason, output.stop_reason
    assert tokens == {"0": 3, "1": 2, "2": 9}
    assert ends == {"0": ("stop", None), "1": ("error", "no token is allowed"), "2": ("length", None)}
    assert core.checker is not None
    core.checker.idle()


def test_a_request_for_a_vector_ends_with_its_prompt():
    core = make_core(max_num_batched_tokens=8, max_num_seqs=4)
    core.add(make_request("text", [1, 2, 3], 6))
    core.add(make_request("vector", list(range(20)), 1, seed=7, pooling="mean"))
    found = {}
    steps = 0
    while core.has_work:
        steps += 1
        for output in core.step():
            if output.pooled is not None:
                found[output.request_id] = steps, output.pooled.tolist(), output.finish_reason, output.new_token_ids
    assert found == {"vector": (4, [7, 20], "stop", [])}  # 5, 7, 7 and 1 tokens beside the decodes
    assert core.checker is not None
    core.checker.idle()
