"""Log-probabilities of tokens asked for by id: those that the whole distribution has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tiny_models import make_checkpoint
from tiny_tokenizers import qwen

from nanovllm import LLM, SamplingParams
from nanovllm.errors import ParameterError

NAMED = [3, 200, 7]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "qwen3", vocab_size=337, eos_token_id=332)
    qwen(path)
    with LLM(str(path), num_gpu_blocks_override=64, block_size=8, max_logprobs=-1) as llm:
        yield llm


def test_named_tokens_are_scored_in_every_position(llm: LLM):
    prompts = ["hello there", "x", "another one"]
    common = {"temperature": 1.0, "max_tokens": 5, "ignore_eos": True, "seed": 3}
    params = [
        SamplingParams(logprob_token_ids=NAMED, prompt_logprob_token_ids=NAMED[:1], **common),
        SamplingParams(logprobs=2, **common),
        SamplingParams(logprobs=2, prompt_logprobs=1, logprob_token_ids=NAMED, **common),
    ]
    everything = SamplingParams(logprobs=-1, prompt_logprobs=-1, **common)
    for prompt, output, asked in zip(prompts, llm.generate(prompts, params, use_tqdm=False), params, strict=True):
        (whole,) = llm.generate(prompt, everything, use_tqdm=False)
        completion, reference = output.outputs[0], whole.outputs[0]
        assert completion.token_ids == reference.token_ids
        named = asked.logprob_token_ids or []
        for token, scores, all_scores in zip(
            completion.token_ids, completion.logprobs or [], reference.logprobs or [], strict=True
        ):
            likeliest = [t for t, entry in all_scores.items() if entry.rank and entry.rank <= (asked.logprobs or 0)]
            assert list(scores) == list(dict.fromkeys([token, *likeliest, *named]))
            for token_id, entry in scores.items():
                assert entry.logprob == pytest.approx(all_scores[token_id].logprob, abs=1e-5)
                ranked = token_id == token or token_id in likeliest
                assert entry.rank == (all_scores[token_id].rank if ranked else None)
                assert entry.decoded_token == all_scores[token_id].decoded_token
        assert (output.prompt_logprobs is None) == (asked.prompt_logprobs is None)
        for scores, all_scores in zip(output.prompt_logprobs or [], whole.prompt_logprobs or [], strict=False):
            assert (scores is None) == (all_scores is None)
            for token_id in asked.prompt_logprob_token_ids or [] if scores else []:
                assert scores[token_id].logprob == pytest.approx(all_scores[token_id].logprob, abs=1e-5)


@pytest.mark.parametrize("name", ["logprob_token_ids", "prompt_logprob_token_ids"])
def test_ids_are_few_and_in_the_vocabulary(llm: LLM, name: str):
    for ids in ([], list(range(129)), ["a"]):
        with pytest.raises(ParameterError, match=name):
            SamplingParams(**{name: ids})
    with pytest.raises(ParameterError, match=name):
        llm.generate("x", SamplingParams(**{name: [337]}), use_tqdm=False)
