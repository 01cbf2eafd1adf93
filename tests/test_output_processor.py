"""Engine outputs become what users read."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import tiny_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.input import EngineInput
from nanovllm.engine.output import OutputProcessor
from nanovllm.engine.plan import EngineOutput, TokenLogprobs
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.outputs import Logprob
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY
KINDS = (CUMULATIVE, DELTA, FINAL_ONLY)
TEXT = "The dog 你好 🙂 and the fox"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizers.qwen(tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="module")
def llama2(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizers.llama2(tmp_path_factory.mktemp("llama2")))


class Bench:
    """An output processor with one request, fed token by token."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: list[int] | None = None, **fields) -> None:
        self.tokenizer = tokenizer
        self.processor = OutputProcessor(tokenizer)
        params = SamplingParams(**{"max_tokens": 100, **fields})
        engine_input = EngineInput("prompt", prompt or [1, 2], params, frozenset(), frozenset(), (), None)
        self.child_ids = ["r"] if params.n == 1 else [f"{index}_r" for index in range(params.n)]
        self.processor.add("r", engine_input, params, self.child_ids)
        self.outputs, self.stopped = [], []

    def feed(self, *token_ids, child=0, reason=None, stop_reason=None, **rest):
        output = EngineOutput(self.child_ids[child], list(token_ids), reason, stop_reason, **rest)
        outputs, stopped = self.processor.process([output])
        self.outputs += outputs
        self.stopped += stopped
        return outputs

    def run(self, token_ids, reason="length", stop_reason=None, child=0):
        """One token per step; stops when the request has ended."""
        for position, token_id in enumerate(token_ids, 1):
            last = position == len(token_ids)
            self.feed(token_id, child=child, reason=reason if last else None, stop_reason=stop_reason if last else None)
            if not self.processor.has("r"):
                break
        return self


def collect(outputs, kind, index=0):
    """(text, token ids, logprobs, finish reason, stop reason) of one completion, put together from all outputs."""
    completions = [c for output in outputs for c in output.outputs if c.index == index]
    last = completions[-1]
    if kind is not DELTA:
        return last.text, last.token_ids, last.logprobs, last.finish_reason, last.stop_reason
    logprobs = None if last.logprobs is None else [entry for c in completions for entry in c.logprobs]
    token_ids = [token_id for c in completions for token_id in c.token_ids]
    return "".join(c.text for c in completions), token_ids, logprobs, last.finish_reason, last.stop_reason


def logprobs_of(token_id: int, value: float = -1.0, rank: int = 1, others=()) -> TokenLogprobs:
    ids = np.array([token_id, *(i for i, _ in others)], dtype=np.int64)
    values = np.array([value, *(v for _, v in others)], dtype=np.float32)
    return TokenLogprobs(ids, values, rank)


# What each kind hands out


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_tells_the_same_story(qwen, kind):
    ids = qwen.encode(TEXT)
    bench = Bench(qwen, output_kind=kind).run(ids, "length")
    assert collect(bench.outputs, kind) == (TEXT, ids, None, "length", None)
    assert [output.finished for output in bench.outputs] == [False] * (len(bench.outputs) - 1) + [True]
    assert len(bench.outputs) == (1 if kind is FINAL_ONLY else len(ids))
    final = bench.outputs[-1]
    assert (final.request_id, final.prompt, final.prompt_token_ids) == ("r", "prompt", [1, 2])
    assert not bench.processor.has("r") and bench.processor.num_requests == 0
    assert not bench.stopped


def test_cumulative_outputs_grow_and_stay_as_they_were(qwen):
    ids = qwen.encode(TEXT)
    bench = Bench(qwen).run(ids)
    for position, output in enumerate(bench.outputs, 1):
        completion = output.outputs[0]
        assert completion.token_ids == ids[:position]
        assert TEXT.startswith(completion.text)
        assert "\ufffd" not in completion.text


def test_deltas_carry_only_what_is_new(qwen):
    ids = qwen.encode(TEXT)
    bench = Bench(qwen, output_kind=DELTA).run(ids)
    assert [output.outputs[0].token_ids for output in bench.outputs] == [[token_id] for token_id in ids]


@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA])
def test_stream_interval_batches_all_but_first_and_last(qwen, kind):
    ids = qwen.encode(TEXT)[:9]
    bench = Bench(qwen, output_kind=kind, stream_interval=4).run(ids)
    seen = [output.outputs[0].token_ids for output in bench.outputs]
    if kind is DELTA:
        assert seen == [ids[:1], ids[1:5], ids[5:9]]
    else:
        assert seen == [ids[:1], ids[:5], ids[:9]]
    assert collect(bench.outputs, kind)[0] == qwen.decode(ids)


def test_the_processors_interval_is_the_least(qwen):
    processor = OutputProcessor(qwen, stream_interval=3)
    params = SamplingParams(output_kind=DELTA, stream_interval=2)
    processor.add("r", EngineInput(None, [1], params, frozenset(), frozenset(), (), None), params, ["r"])
    sizes = [len(o.token_ids) for _ in range(8) for o in processor.process([EngineOutput("r", [5])])[0]]
    assert sizes == [1, 3, 3]


# The end of an output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reason", ["length", "abort", "error", "repetition"])
def test_no_text_is_lost_whatever_ends_it(qwen, kind, reason):
    ids = qwen.encode("ab🙂")[:-1]
    bench = Bench(qwen, output_kind=kind).run(ids, reason)
    assert collect(bench.outputs, kind) == (qwen.decode(ids), ids, None, reason, None)
    assert qwen.decode(ids).endswith("\ufffd")


@pytest.mark.parametrize("kind", KINDS)
def test_eos_stays_in_the_tokens_and_not_in_the_text(qwen, kind):
    for skip in (True, False):
        ids = [*qwen.encode("done"), qwen.eos_token_id]
        bench = Bench(qwen, output_kind=kind, skip_special_tokens=skip).run(ids, "stop")
        assert collect(bench.outputs, kind) == ("done", ids, None, "stop", None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("include", [False, True])
def test_the_text_of_a_stop_token_is_dropped_unless_asked_for(qwen, kind, include):
    ids = qwen.encode("go!")
    bench = Bench(qwen, output_kind=kind, include_stop_str_in_output=include).run(ids, "stop", ids[-1])
    assert collect(bench.outputs, kind) == ("go!" if include else "go", ids, None, "stop", ids[-1])


def test_special_tokens_are_shown_on_request(qwen):
    ids = [qwen.eos_token_id, *qwen.encode("a"), qwen.eos_token_id]
    shown = Bench(qwen, skip_special_tokens=False, include_stop_str_in_output=True).run(ids, "stop")
    assert shown.outputs[-1].text == "<|im_end|>a<|im_end|>"
    assert Bench(qwen).run(ids, "length").outputs[-1].text == "a"


def test_the_text_continues_the_prompt(llama2):
    hello, world = llama2.encode("Hello"), llama2.encode("world", add_special_tokens=False)
    for kind in KINDS:
        assert collect(Bench(llama2, hello, output_kind=kind).run(world).outputs, kind)[0] == " world"


@pytest.mark.parametrize("kind", KINDS)
def test_without_text(qwen, kind):
    ids = qwen.encode(TEXT)
    for bench in (Bench(None, output_kind=kind), Bench(qwen, output_kind=kind, detokenize=False)):
        assert collect(bench.run(ids).outputs, kind) == ("", ids, None, "length", None)


def test_an_end_without_a_token(qwen):
    for kind in KINDS:
        bench = Bench(qwen, output_kind=kind)
        bench.feed(reason="error", stop_reason="out of luck")
        assert collect(bench.outputs, kind) == ("", [], None, "error", "out of luck")
        assert bench.outputs[-1].finished


# Stop strings


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_across_tokens_ends_the_output_and_tells_the_engine(qwen, kind, include):
    ids = qwen.encode("one two three")
    bench = Bench(qwen, output_kind=kind, stop=["e tw"], include_stop_str_in_output=include)
    bench.run([*ids, *ids], "length")
    text, token_ids, _, reason, stop_reason = collect(bench.outputs, kind)
    assert (text, reason, stop_reason) == ("one tw" if include else "on", "stop", "e tw")
    # The tokens that formed it stay.
    assert token_ids == ids[: len(token_ids)] and qwen.decode(token_ids).startswith("one tw")
    assert not qwen.decode(token_ids[:-1]).startswith("one tw")
    assert bench.stopped == ["r"]
    assert bench.outputs[-1].finished and not bench.processor.has("r")
    # What the engine had in flight has no effect.
    assert bench.feed(5, 6, reason="length") == []


def test_a_stop_string_overrides_length_and_needs_no_engine(qwen):
    ids = qwen.encode("go STOP")
    bench = Bench(qwen, stop="STOP").run(ids, "length")
    completion = bench.outputs[-1].outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("go ", "stop", "STOP")
    assert bench.stopped == []


def test_tokens_after_a_stop_string_in_one_step_are_cut_off(qwen):
    ids, more = qwen.encode("a.b"), qwen.encode("more")
    bench = Bench(qwen, stop=".b", logprobs=0)
    bench.feed(*ids, *more, logprobs=[logprobs_of(token_id) for token_id in [*ids, *more]])
    completion = bench.outputs[-1].outputs[0]
    assert (completion.text, completion.token_ids, len(completion.logprobs)) == ("a", ids, len(ids))
    assert completion.cumulative_logprob == -1.0 * len(ids)
    assert bench.stopped == ["r"]


def test_held_back_text_comes_out_at_the_end(qwen):
    ids = qwen.encode("wait for it")
    for kind in KINDS:
        bench = Bench(qwen, output_kind=kind, stop=["it was never said"]).run(ids)
        assert collect(bench.outputs, kind)[0] == "wait for it"
        ended = Bench(qwen, output_kind=kind, stop=["it was never said"]).run([*ids, qwen.eos_token_id], "stop")
        assert collect(ended.outputs, kind)[0] == "wait for it"


def test_streaming_holds_back_what_may_belong_to_a_stop_string(qwen):
    ids = [qwen.get_vocab()[character] for character in "abcdef"]
    bench = Bench(qwen, stop=["xyz"]).run(ids, None)
    assert [output.text for output in bench.outputs] == ["", "", "a", "ab", "abc", "abcd"]


def test_stop_strings_count_only_after_min_tokens(qwen):
    ids = [qwen.get_vocab()[character] for character in "ababab"]
    for min_tokens, text in ((0, ""), (1, ""), (2, "ab"), (3, "ab"), (4, "abab")):
        bench = Bench(qwen, stop=["ab"], min_tokens=min_tokens).run(ids)
        assert bench.outputs[-1].text == text, min_tokens
        assert bench.outputs[-1].outputs[0].stop_reason == "ab"


def test_a_stop_string_may_match_what_the_end_flushes(qwen):
    ids = qwen.encode("🙂")[:-1]
    bench = Bench(qwen, stop=["\ufffd"]).run(ids, "length")
    completion = bench.outputs[-1].outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("", "stop", "\ufffd")


# Log-probabilities


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_have_the_token_first_and_the_likeliest_after(qwen, kind):
    vocab = qwen.get_vocab()
    a, b, space_a = vocab["a"], vocab["b"], vocab["Ġa"]
    bench = Bench(qwen, output_kind=kind, logprobs=2)
    bench.feed(a, logprobs=[logprobs_of(a, -2.5, 7, [(b, -0.5), (space_a, -1.5)])])
    bench.feed(b, reason="length", logprobs=[logprobs_of(b, -0.25, 1, [(b, -0.25), (vocab["ä"], -3.0)])])
    _, _, logprobs, _, _ = collect(bench.outputs, kind)
    assert logprobs == [
        {a: Logprob(-2.5, 7, "a"), b: Logprob(-0.5, 1, "b"), space_a: Logprob(-1.5, 2, " a")},
        {b: Logprob(-0.25, 1, "b"), vocab["ä"]: Logprob(-3.0, 2, "\ufffd")},
    ]
    assert [list(entry) for entry in logprobs] == [[a, b, space_a], [b, vocab["ä"]]]
    assert bench.outputs[-1].outputs[0].cumulative_logprob == -2.75


def test_logprobs_without_a_tokenizer_have_no_text():
    bench = Bench(None, logprobs=0)
    bench.feed(5, reason="length", logprobs=[logprobs_of(5)])
    assert bench.outputs[0].outputs[0].logprobs == [{5: Logprob(-1.0, 1, None)}]


def test_streamed_logprobs_do_not_change_later(qwen):
    bench = Bench(qwen, logprobs=0)
    for token_id in (5, 6, 7):
        bench.feed(token_id, logprobs=[logprobs_of(token_id)])
    assert [len(output.outputs[0].logprobs) for output in bench.outputs] == [1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_logprobs_arrive_in_pieces_and_begin_with_none(qwen, kind):
    bench = Bench(qwen, [5, 6, 7, 8], output_kind=kind, prompt_logprobs=0)
    assert bench.feed(prompt_logprobs=[logprobs_of(6, -1.0, 3)]) == []
    bench.feed(9, prompt_logprobs=[logprobs_of(7, -2.0), logprobs_of(8, -3.0)])
    bench.feed(10, reason="length")
    expected = [
        None,
        {6: Logprob(-1.0, 3, qwen.token_text(6))},
        {7: Logprob(-2.0, 1, qwen.token_text(7))},
        {8: Logprob(-3.0, 1, qwen.token_text(8))},
    ]
    assert bench.outputs[0].prompt_logprobs == expected
    if kind is CUMULATIVE:
        assert bench.outputs[1].prompt_logprobs == expected
    if kind is DELTA:
        assert bench.outputs[1].prompt_logprobs is None


# Several outputs of one request


@pytest.mark.parametrize("kind", KINDS)
def test_n_outputs_come_together_by_index(qwen, kind):
    streams = [qwen.encode(text) for text in ("first", "the second one", "3")]
    bench = Bench(qwen, n=3, output_kind=kind)
    order = [(child, position) for child, ids in enumerate(streams) for position in range(len(ids))]
    random.Random(0).shuffle(order)
    counts = [0, 0, 0]
    for child, _ in order:
        counts[child] += 1
        ids = streams[child]
        last = counts[child] == len(ids)
        bench.feed(ids[counts[child] - 1], child=child, reason="length" if last else None)
    for index, ids in enumerate(streams):
        assert collect(bench.outputs, kind, index) == (qwen.decode(ids), ids, None, "length", None)
    assert [output.finished for output in bench.outputs] == [False] * (len(bench.outputs) - 1) + [True]
    if kind is not DELTA:
        assert [completion.index for completion in bench.outputs[-1].outputs] == [0, 1, 2]
    if kind is FINAL_ONLY:
        assert len(bench.outputs) == 1


def test_one_step_gives_one_output_per_request(qwen):
    bench = Bench(qwen, n=2, output_kind=DELTA)
    outputs, _ = bench.processor.process([EngineOutput("0_r", [5]), EngineOutput("1_r", [6])])
    assert [(completion.index, completion.token_ids) for completion in outputs[0].outputs] == [(0, [5]), (1, [6])]
    outputs, _ = bench.processor.process([EngineOutput("1_r", [7])])
    assert [(completion.index, completion.token_ids) for completion in outputs[0].outputs] == [(1, [7])]


def test_a_stop_string_ends_only_its_own_output(qwen):
    ids = qwen.encode("a.")
    bench = Bench(qwen, n=2, stop=["."])
    bench.feed(*ids, child=1)
    assert bench.stopped == ["1_r"] and not bench.outputs[-1].finished
    assert bench.feed(9, child=1) == []
    bench.feed(*qwen.encode("b"), child=0, reason="length")
    assert [c.finish_reason for c in bench.outputs[-1].outputs] == ["length", "stop"]
    assert bench.outputs[-1].finished


def test_the_first_output_tells_what_the_cache_saved(qwen):
    bench = Bench(qwen, n=2)
    bench.feed(5, child=0, num_cached_tokens=32)
    bench.feed(5, child=1, num_cached_tokens=48)  # shares the first one's blocks
    bench.feed(6, child=0)
    assert [output.num_cached_tokens for output in bench.outputs] == [32, 32, 32]


def test_metrics_tell_when_things_happened(qwen):
    stats = Bench(qwen, output_kind=FINAL_ONLY).run([5, 6, 7]).outputs[0].metrics
    assert 0 < stats.arrival_ts <= stats.first_token_ts <= stats.last_token_ts
    assert stats.num_generation_tokens == 3 and stats.first_token_latency >= 0


# Abort


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("stop", [None, ["never there"]])
def test_abort_gives_one_final_output_and_nothing_after(qwen, kind, tokens, stop):
    ids = qwen.encode(TEXT)[:tokens]
    bench = Bench(qwen, output_kind=kind, stop=stop)
    for token_id in ids:
        bench.feed(token_id)
    final, children = bench.processor.abort("r")
    assert final.finished and children == ["r"]
    assert collect([*bench.outputs, final], kind) == (qwen.decode(ids), ids, None, "abort", None)
    assert bench.processor.abort("r") == (None, []) == bench.processor.abort("unknown")
    assert bench.feed(5, reason="length") == []
    assert bench.processor.num_requests == 0


def test_abort_leaves_finished_outputs_as_they_are(qwen):
    bench = Bench(qwen, n=2, output_kind=FINAL_ONLY)
    bench.feed(5, child=1, reason="length")
    bench.feed(6, child=0)
    final, children = bench.processor.abort("r")
    assert children == ["0_r"]
    assert [(c.finish_reason, c.token_ids) for c in final.outputs] == [("abort", [6]), ("length", [5])]


def test_nothing_is_kept_of_requests_that_ended(qwen):
    bench = Bench(qwen, n=2, stop=["x"])
    bench.feed(qwen.get_vocab()["x"], child=0)
    bench.processor.abort("r")
    assert not bench.processor._requests and not bench.processor._children


# All of it at once


def test_all_kinds_agree_on_random_requests(qwen):
    @settings(max_examples=150)
    @given(
        st.lists(st.integers(0, len(qwen) + 2), min_size=1, max_size=12),
        st.lists(st.text("aeo t.", min_size=1, max_size=3), max_size=2),
        st.sampled_from(["length", "stop", "abort", "error", "repetition"]),
        st.booleans(),
        st.integers(0, 4),
        st.integers(1, 4),
        st.data(),
    )
    def check(ids, stop, reason, include, min_tokens, interval, data):
        cuts = data.draw(st.lists(st.integers(1, 3), min_size=len(ids), max_size=len(ids)))
        results = []
        for kind in KINDS:
            bench = Bench(
                qwen,
                output_kind=kind,
                stop=stop,
                include_stop_str_in_output=include,
                min_tokens=min_tokens,
                stream_interval=interval,
                logprobs=0,
            )
            rest, sizes = list(ids), iter(cuts)
            while rest and bench.processor.has("r"):
                size = next(sizes)
                now, rest = rest[:size], rest[size:]
                bench.feed(*now, reason=None if rest else reason, logprobs=[logprobs_of(i) for i in now])
            results.append(collect(bench.outputs, kind))
            assert bench.outputs[-1].finished
        assert results[0] == results[1] == results[2]
        text, token_ids, logprobs, finish_reason, stop_reason = results[0]
        assert token_ids == ids[: len(token_ids)] and len(logprobs) == len(token_ids)
        if isinstance(stop_reason, str):
            assert finish_reason == "stop" and stop_reason in stop
            assert text.endswith(stop_reason) or not include
        else:
            shown = ids[:-1] if reason == "stop" and not include else ids
            assert text == qwen.decode(shown) and finish_reason == reason

    check()


def test_cumulative_logprob_is_a_plain_float(qwen):
    bench = Bench(qwen, logprobs=0)
    bench.feed(5, reason="length", logprobs=[logprobs_of(5, -math.inf)])
    assert type(bench.outputs[0].outputs[0].cumulative_logprob) is float
