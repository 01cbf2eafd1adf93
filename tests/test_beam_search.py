"""Beam search over forks against a plain one over full forward passes of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_checkpoint, reference_logits
from tiny_tokenizers import qwen

from nanovllm import LLM, BeamSearchParams, SamplingParams
from nanovllm.engine.invariants import InvariantChecker
from nanovllm.errors import ParameterError, StepError

PROMPTS = [{"prompt_token_ids": [5, 9, 50]}, {"prompt_token_ids": list(range(20, 39))}]
EOS = 2


def plain_beam_search(
    model: Any, prompt: list[int], width: int, max_tokens: int, eos: int | None, penalty: float
) -> list[tuple[list[int], float]]:
    """(tokens, summed log-probability) of the best hypotheses, every step a full forward pass."""

    def score(entry: tuple[list[int], float]) -> float:
        length = len(entry[0]) - (entry[0][-1] == eos)
        return entry[1] / length**penalty

    beams: list[tuple[list[int], float]] = [(prompt, 0.0)]
    done: list[tuple[list[int], float]] = []
    for _ in range(max_tokens):
        grown = []
        for tokens, total in beams:
            values, ids = reference_logits(model, tokens)[-1].log_softmax(-1).topk(2 * width)
            for value, token in zip(values.tolist(), ids.tolist(), strict=True):
                entry = ([*tokens, token], total + value)
                (done if token == eos else grown).append(entry)
        beams = sorted(grown, key=score, reverse=True)[:width]
    return sorted(done + beams, key=score, reverse=True)[:width]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("beam")
    return path, make_checkpoint(path, "qwen3", vocab_size=61, eos_token_id=EOS)


@pytest.mark.parametrize("options", [{}, {"enable_prefix_caching": False}, {"num_gpu_blocks_override": 12}], ids=str)
@pytest.mark.parametrize(("ignore_eos", "penalty"), [(True, 1.0), (False, 1.0), (False, 0.3)])
def test_beams_equal_a_plain_search(checkpoint: tuple[Path, Any], options: Any, ignore_eos: bool, penalty: float):
    path, model = checkpoint
    settings = {"num_gpu_blocks_override": 100, "block_size": 4, "max_model_len": 40, **options}
    with LLM(str(path), skip_tokenizer_init=True, dtype="float32", **settings) as llm:
        core = llm.llm_engine.core
        core.checker = InvariantChecker(core.scheduler)
        params = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=ignore_eos, length_penalty=penalty)
        outputs = llm.beam_search(PROMPTS, params)
        core.checker.idle()
        assert [s.tokens for o in llm.beam_search(PROMPTS, params, concurrency_limit=1) for s in o.sequences] == [
            s.tokens for o in outputs for s in o.sequences
        ]
        core.checker.idle()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = plain_beam_search(model, prompt["prompt_token_ids"], 3, 6, None if ignore_eos else EOS, penalty)
        assert [s.tokens for s in output.sequences] == [tokens for tokens, _ in expected]
        assert [s.cum_logprob for s in output.sequences] == pytest.approx([total for _, total in expected], abs=1e-3)
        assert all(s.finish_reason in ("stop", "length") for s in output.sequences)


def test_each_round_computes_one_token_per_beam(checkpoint: tuple[Path, Any]):
    path, _ = checkpoint
    with LLM(
        str(path), skip_tokenizer_init=True, num_gpu_blocks_override=100, block_size=4, enable_prefix_caching=False
    ) as llm:
        core = llm.llm_engine.core
        core.checker = InvariantChecker(core.scheduler)
        llm.beam_search([PROMPTS[0]], BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True))
        assert core.checker.num_slots_written == 3 + 5 * 3  # the prompt, then five rounds of three forks


def test_what_beam_search_cannot_honour_is_refused(checkpoint: tuple[Path, Any]):
    path, _ = checkpoint
    with LLM(str(path), skip_tokenizer_init=True, num_gpu_blocks_override=40, block_size=4) as llm:
        with pytest.raises(ParameterError, match="temperature"):
            llm.beam_search([PROMPTS[0]], BeamSearchParams(beam_width=2, max_tokens=3, temperature=0.5))
        with pytest.raises(ParameterError, match="beam_width"):
            llm.beam_search([PROMPTS[0]], BeamSearchParams(beam_width=40, max_tokens=3))
        assert not llm.llm_engine.has_unfinished_requests()


def test_enqueued_requests_survive_a_beam_search(checkpoint: tuple[Path, Any]):
    path, _ = checkpoint
    with LLM(str(path), skip_tokenizer_init=True, num_gpu_blocks_override=40, block_size=4) as llm:
        llm.enqueue([5, 6, 7], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
        llm.beam_search([PROMPTS[0]], BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True))
        (output,) = llm.wait_for_completion(use_tqdm=False)
        assert len(output.token_ids) == 2


def test_steps_that_go_on_failing_end_the_search_and_nothing_else(checkpoint: tuple[Path, Any]):
    path, _ = checkpoint
    with LLM(str(path), skip_tokenizer_init=True, num_gpu_blocks_override=40, block_size=4, max_num_seqs=4) as llm:
        core = llm.llm_engine.core
        core.checker = InvariantChecker(core.scheduler)
        forward = core.executor._runner.forward
        calls, broken = iter(range(100)), True

        def failing(*arguments: Any) -> Any:
            if broken and next(calls) >= 2:
                raise ZeroDivisionError("on purpose")
            return forward(*arguments)

        core.executor._runner.forward = failing
        params = BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True)
        with pytest.raises(StepError, match="on purpose"):
            llm.beam_search([PROMPTS[0]], params)
        broken = False
        assert len(llm.beam_search([PROMPTS[0]], params)[0].sequences) == 2
        core.checker.idle()


def test_text_goes_with_the_tokens_and_eos_is_left_out(tmp_path: Path):
    make_checkpoint(tmp_path, "qwen3", vocab_size=337, eos_token_id=332)
    qwen(tmp_path)
    with LLM(str(tmp_path), num_gpu_blocks_override=100, block_size=4) as llm:
        (output,) = llm.beam_search([{"prompt": "hello"}], BeamSearchParams(beam_width=2, max_tokens=5))
        decode, start = llm.get_tokenizer().decode, len(llm.get_tokenizer().encode("hello"))
        for sequence in output.sequences:
            tokens = sequence.tokens[start:]
            assert sequence.text == decode([token for token in tokens if token != 332])
