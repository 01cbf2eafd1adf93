"""`LLM` as vLLM's users know it: forms of prompts, parameters, outputs, errors, and its life."""

from __future__ import annotations

import gc
import json
import logging
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_checkpoint
from tiny_tokenizers import qwen

from nanovllm import LLM, RequestOutputKind, SamplingParams
from nanovllm.engine.invariants import InvariantChecker
from nanovllm.errors import EngineDeadError, ModelError, ParameterError, StepError

VOCAB_SIZE, IM_END = 337, 332  # of tiny_tokenizers.qwen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "qwen3", vocab_size=VOCAB_SIZE, eos_token_id=IM_END)
    qwen(path)
    return path


def make_llm(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), **{"num_gpu_blocks_override": 64, "block_size": 8, **options})


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with make_llm(folder) as llm:
        llm.llm_engine.core.checker = InvariantChecker(llm.llm_engine.core.scheduler)
        yield llm
        llm.llm_engine.core.checker.idle()


GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def test_all_forms_of_a_prompt_mean_the_same(llm: LLM):
    ids = llm.get_tokenizer().encode("hello")
    forms: list[Any] = ["hello", ids, {"prompt": "hello"}, {"prompt_token_ids": ids}]
    singles = [llm.generate(form, GREEDY, use_tqdm=False) for form in forms]
    assert all(len(outputs) == 1 for outputs in singles)
    together = llm.generate([*forms], GREEDY, use_tqdm=False)
    texts = {outputs[0].outputs[0].text for outputs in [*singles, together]}
    assert len(texts) == 1
    assert singles[0][0].prompt == "hello" and singles[1][0].prompt is None
    assert all(output.prompt_token_ids == ids for output in together)


def test_outputs_are_vllms_and_nano_vllms(llm: LLM):
    (output,) = llm.generate("hello", GREEDY, use_tqdm=False)
    assert output.finished and output.outputs[0].finish_reason == "length" and output.outputs[0].index == 0
    assert output["text"] == output.text == output.outputs[0].text
    assert output["token_ids"] == output.token_ids == output.outputs[0].token_ids
    assert len(output.token_ids) == 6
    assert llm.get_tokenizer().decode(output.token_ids) == output.text


def test_outputs_come_in_the_order_of_prompts_with_their_own_parameters(llm: LLM):
    prompts = ["a", "bb", "ccc"]
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (7, 2, 4)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.token_ids) for output in outputs] == [7, 2, 4]


def test_the_users_parameters_are_not_changed(llm: LLM):
    params = SamplingParams(max_tokens=None, temperature=0.0, output_kind=RequestOutputKind.DELTA)
    llm.generate("hello", params, use_tqdm=False)
    assert params.max_tokens is None and params.output_kind is RequestOutputKind.DELTA


def test_lists_of_another_length_are_refused(llm: LLM):
    with pytest.raises(ParameterError, match="sampling_params"):
        llm.generate(["a", "b"], [GREEDY], use_tqdm=False)
    with pytest.raises(ParameterError, match="priority"):
        llm.generate(["a", "b"], GREEDY, priority=[1], use_tqdm=False)


def test_chat_renders_the_template_once(llm: LLM):
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False)
    assert output.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert output.prompt_token_ids[0] != output.prompt_token_ids[1]
    two = llm.chat([messages, messages], GREEDY, use_tqdm=False)
    assert [o.token_ids for o in two] == [output.token_ids] * 2


def test_enqueued_requests_wait_for_their_own_call(llm: LLM):
    first = llm.enqueue(["a", "b"], GREEDY)
    (between,) = llm.generate("c", GREEDY, use_tqdm=False)
    second = llm.enqueue_chat([{"role": "user", "content": "d"}], GREEDY)
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [o.request_id for o in outputs] == first + second
    assert between.prompt == "c" and [o.prompt for o in outputs[:2]] == ["a", "b"]
    assert llm.wait_for_completion(use_tqdm=False) == []


def test_a_stop_string_ends_the_output_and_its_request(llm: LLM):
    (free,) = llm.generate("hello", SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True), use_tqdm=False)
    text = free.text
    stop = text[8:10]
    cut = text.index(stop)
    for include in (False, True):
        params = SamplingParams(
            temperature=0.0, max_tokens=30, ignore_eos=True, stop=[stop], include_stop_str_in_output=include
        )
        (output,) = llm.generate("hello", params, use_tqdm=False)
        assert output.text == text[: cut + (len(stop) if include else 0)]
        assert output.outputs[0].finish_reason == "stop" and output.outputs[0].stop_reason == stop
        assert len(output.token_ids) < 30


def test_a_stop_token_ends_the_output(llm: LLM):
    (free,) = llm.generate("hello", GREEDY, use_tqdm=False)
    token = free.token_ids[2]
    first = free.token_ids.index(token)
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, stop_token_ids=[token])
    (output,) = llm.generate("hello", params, use_tqdm=False)
    assert output.token_ids == free.token_ids[: first + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", token)


def test_eos_ends_the_output_and_is_not_shown(llm: LLM):
    params = SamplingParams(temperature=0.0, max_tokens=6, logit_bias={IM_END: 100})
    (output,) = llm.generate("hello", params, use_tqdm=False)
    assert output.token_ids == [IM_END] and output.text == ""
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)
    params = SamplingParams(temperature=0.0, max_tokens=6, min_tokens=3, logit_bias={IM_END: 100})
    (output,) = llm.generate("hello", params, use_tqdm=False)
    assert len(output.token_ids) == 4 and output.token_ids.index(IM_END) == 3


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt cannot be empty"),
        ([], {}, "prompt"),
        ([5, VOCAB_SIZE], {}, f"Token id {VOCAB_SIZE} is out of vocabulary"),
        ([5, -1], {}, "Token id -1 is out of vocabulary"),
        ([1] * 300, {}, "maximum context length is 256 tokens"),
        ([1] * 256, {}, "maximum context length is 256 tokens"),
        ("a", {"max_tokens": 500}, "max_tokens=500 cannot be greater than max_model_len=256"),
        ("a", {"logprobs": 21}, "greater than max allowed: 20"),
        ("a", {"stop_token_ids": [999]}, "stop_token_ids"),
        ("a", {"allowed_token_ids": [999]}, "allowed_token_ids"),
        ("a", {"logit_bias": {999: 1.0}}, "logit_bias"),
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, {}, "multi_modal_data"),
        ({"nonsense": "a"}, {}, "nonsense"),
        (3.5, {}, "prompt"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_requests_are_refused_by_name_and_the_others_go_on(llm: LLM, prompt: Any, options: Any, message: str):
    engine = llm.llm_engine
    engine.add_request("good", "hello", GREEDY)
    with pytest.raises(ValueError, match=message):
        engine.add_request("bad", prompt, SamplingParams(**options))
    outputs = {}
    while engine.has_unfinished_requests():
        outputs.update({output.request_id: output for output in engine.step()})
    assert list(outputs) == ["good"] and outputs["good"].finished


def test_one_bad_prompt_in_a_list_queues_nothing(llm: LLM):
    with pytest.raises(ValueError, match="out of vocabulary"):
        llm.generate(["fine", [99999]], GREEDY, use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()


def test_vllms_keywords_are_taken_as_none_and_refused_otherwise(llm: LLM):
    none = {"lora_request": None, "tokenization_kwargs": None, "mm_processor_kwargs": None}
    assert llm.generate("hello", GREEDY, use_tqdm=False, **none)
    chat = [{"role": "user", "content": "hi"}]
    assert llm.chat(chat, GREEDY, use_tqdm=False, chat_template_content_format="auto", **none)
    with pytest.raises(ParameterError, match="lora_request"):
        llm.generate("hello", GREEDY, use_tqdm=False, lora_request="adapter")
    with pytest.raises(TypeError, match="nonsense"):
        llm.chat(chat, GREEDY, use_tqdm=False, nonsense=1)
    with pytest.raises(ParameterError, match="sampling_params"):
        llm.generate("hello", {"temperature": 0}, use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="priority"):
        llm.generate("hello", GREEDY, priority=1.5, use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="Unicode"):
        llm.generate("\ud800", GREEDY, use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()


def test_a_repeated_request_id_is_refused(llm: LLM):
    llm.llm_engine.add_request("twice", "a", GREEDY)
    with pytest.raises(ParameterError, match="twice"):
        llm.llm_engine.add_request("twice", "a", GREEDY)
    (final,) = llm.llm_engine.abort_request("twice")
    assert final.finished and final.outputs[0].finish_reason == "abort"
    assert llm.llm_engine.abort_request(["twice", "never"]) == []


def test_streaming_through_the_lower_face_gives_deltas(llm: LLM):
    engine = llm.llm_engine
    (whole,) = llm.generate("hello", GREEDY, use_tqdm=False)
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    engine.add_request("s", "hello", params)
    text, ids = "", []
    while engine.has_unfinished_requests():
        for output in engine.step():
            text += output.outputs[0].text
            ids += output.outputs[0].token_ids
    assert (text, ids) == (whole.text, whole.token_ids)


def test_steps_that_go_on_failing_end_the_call_and_the_engine_goes_on(folder: Path):
    with make_llm(folder) as llm:
        core = llm.llm_engine.core
        core.checker = InvariantChecker(core.scheduler)
        expected = llm.generate("hello", GREEDY, use_tqdm=False)[0].token_ids
        submit, calls, broken = core.executor.submit, iter(range(100)), True

        class Broken:
            num_blocks = core.executor.num_blocks
            shutdown = core.executor.shutdown
            recover = core.executor.recover

            def submit(self, plan: Any) -> Any:
                handle = submit(plan)
                if broken and next(calls) >= 2:

                    class Handle:
                        def result(self) -> None:
                            handle.result()
                            raise ZeroDivisionError("on purpose")

                    return Handle()
                return handle

        core.executor = Broken()
        with pytest.raises(StepError, match="on purpose"):
            llm.generate(["a", "b"], GREEDY, use_tqdm=False)
        core.checker.check()
        broken = False
        assert llm.generate("hello", GREEDY, use_tqdm=False)[0].token_ids == expected
        core.checker.idle()


def test_an_interrupted_call_leaves_nothing_behind(folder: Path):
    with make_llm(folder) as llm:
        core = llm.llm_engine.core
        core.checker = InvariantChecker(core.scheduler)
        step = llm.llm_engine.step
        calls = iter(range(100))

        def interrupted() -> Any:
            if next(calls) == 2:
                raise KeyboardInterrupt
            return step()

        llm.llm_engine.step = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], GREEDY, use_tqdm=False)
        llm.llm_engine.step = step  # type: ignore[method-assign]
        assert len(llm.generate("hello", GREEDY, use_tqdm=False)[0].token_ids) == 6
        core.checker.idle()


def test_prefixes_are_shared_across_calls_unless_reset_or_salted(folder: Path):
    with make_llm(folder) as llm:
        prompt = "a long enough prompt for blocks"
        length = len(llm.get_tokenizer().encode(prompt))
        cached = [llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens for _ in range(2)]
        assert cached == [0, (length - 1) // 8 * 8] and length > 8
        assert llm.generate({"prompt": prompt, "cache_salt": "me"}, GREEDY, use_tqdm=False)[0].num_cached_tokens == 0
        assert llm.reset_prefix_cache()
        assert llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens == 0


def test_a_context_that_does_not_fit_is_shortened_with_one_notice(folder: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "nanovllm"), make_llm(folder, num_gpu_blocks_override=9) as llm:
        assert llm.llm_engine.model_config.max_model_len == 64
        (output,) = llm.generate(
            [1] * 40, SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True), use_tqdm=False
        )
        assert len(output.token_ids) == 24 and output.outputs[0].finish_reason == "length"
    notices = [r.getMessage() for r in caplog.records if "max_model_len" in r.getMessage()]
    assert notices and len(notices) == 1 and "256 to 64" in notices[0]


def test_two_engines_live_side_by_side_and_close_frees_everything(folder: Path):
    first, second = make_llm(folder), make_llm(folder)
    expected = first.generate("hello", GREEDY, use_tqdm=False)[0].token_ids
    first.close()
    first.close()
    assert second.generate("hello", GREEDY, use_tqdm=False)[0].token_ids == expected
    with pytest.raises(EngineDeadError, match="closed"):
        first.generate("hello", GREEDY, use_tqdm=False)
    core = weakref.ref(second.llm_engine.core)
    second.close()
    threads = [thread.name for thread in threading.enumerate() if "nanovllm" in thread.name]
    del first, second
    gc.collect()
    assert core() is None and not threads


def test_model_defaults_are_used_without_parameters(tmp_path: Path):
    make_checkpoint(tmp_path, "qwen3", vocab_size=VOCAB_SIZE, eos_token_id=IM_END)
    qwen(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"temperature": 0.7, "top_k": 5, "max_new_tokens": 3, "eos_token_id": [IM_END, 7]})
    )
    with make_llm(tmp_path) as llm:
        defaults = llm.get_default_sampling_params()
        assert (defaults.temperature, defaults.top_k, defaults.max_tokens) == (0.7, 5, 3)
        assert len(llm.generate("hello", use_tqdm=False)[0].token_ids) <= 3
        stop = SamplingParams(temperature=0.0, logit_bias={7: 100})
        assert llm.generate("hello", stop, use_tqdm=False)[0].outputs[0].finish_reason == "stop"
    with make_llm(tmp_path, generation_config="vllm") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


def test_a_folder_that_is_no_model_is_named_with_the_remedy(tmp_path: Path, folder: Path):
    with pytest.raises(ModelError, match=r"config\.json"):
        LLM(str(tmp_path))
    with pytest.raises(ModelError, match="no such folder"):
        LLM("./nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="JSON"):
        LLM(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"], "vocab_size": 5}))
    with pytest.raises(ModelError, match=r"MambaForCausalLM.*Qwen3ForCausalLM"):
        LLM(str(tmp_path), skip_tokenizer_init=True)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        LLM(str(tmp_path), skip_tokenizer_init=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "dtype"),
        ({"device": "tpu"}, "tpu"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"quantization": "awq"}, "quantization"),
        ({"block_size": 0}, "block_size"),
        ({"max_model_len": 100000}, "max_model_len"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "max_num_batched_tokens"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"load_format": "pt"}, "load_format"),
        ({"num_gpu_blocks_override": 1}, "num_gpu_blocks_override"),
        ({"attention_backend": "nonsense"}, "attention_backend"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy"),
    ],
    ids=str,
)
def test_bad_engine_arguments_are_refused_by_name(folder: Path, options: dict[str, Any], message: str):
    with pytest.raises(ParameterError, match=message):
        LLM(str(folder), **options)


def test_unknown_arguments_are_refused_and_retired_ones_warned_of(folder: Path, caplog: pytest.LogCaptureFixture):
    with pytest.raises(TypeError, match="max_num_seqs"):
        LLM(str(folder), max_num_seq=4)
    with caplog.at_level(logging.WARNING, "nanovllm"), make_llm(folder, swap_space=4):
        pass
    assert any("swap_space" in record.getMessage() for record in caplog.records)


def test_skip_tokenizer_init_takes_and_gives_ids(folder: Path):
    with make_llm(folder, skip_tokenizer_init=True) as llm:
        assert llm.get_tokenizer() is None
        (output,) = llm.generate([1, 2, 3], GREEDY, use_tqdm=False)
        assert len(output.token_ids) == 6 and output.text == ""
        with pytest.raises(ParameterError, match="tokenizer"):
            llm.generate("text", GREEDY, use_tqdm=False)


def test_the_progress_bar_shows_speeds(llm: LLM, capsys: pytest.CaptureFixture[str]):
    llm.generate(["a", "b"], GREEDY)
    shown = capsys.readouterr().err
    assert "Processed prompts" in shown and "est. speed input" in shown and "2/2" in shown
