"""On a CPU with our kernels, a request's tokens and log-probabilities are the same bits whatever happens around it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.ops.cpu import library

pytestmark = pytest.mark.skipif(not library.supported_instruction_sets(), reason="the C++ kernels are not built")

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
Answers = list[tuple[list[int], list[dict[int, float]]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """32 of all lengths, two of them longer than a partition of attention's."""
    draw = random.Random(1)
    lengths = [700, 560, *(draw.randint(1, 150) for _ in range(30))]
    return [[draw.randrange(CONFIG["vocab_size"]) for _ in range(length)] for length in lengths]  # type: ignore[call-overload]


def answers(folder: Path, calls: list[list[list[int]]], **options: Any) -> Answers:
    """Tokens and log-probabilities of every prompt, after ``calls`` of generate in turn."""
    params = SamplingParams(temperature=0.8, seed=7, max_tokens=8, logprobs=3, ignore_eos=True)
    with LLM(str(folder), load_format="dummy", skip_tokenizer_init=True, num_gpu_blocks_override=600, **options) as llm:
        outputs = [output for prompts in calls for output in llm.generate(prompts, params, use_tqdm=False)]
    return [
        (list(o.outputs[0].token_ids), [{t: p.logprob for t, p in e.items()} for e in o.outputs[0].logprobs])
        for o in outputs
    ]


@pytest.mark.parametrize("quantization", [None, "int8", "int4", "w8a8"])
def test_a_request_is_the_same_bits_alone_in_a_batch_in_chunks_and_behind_a_prefix_hit(
    folder: Path, prompts: list[list[int]], quantization: str | None
) -> None:
    plain = {"quantization": quantization, "enable_prefix_caching": False}
    together = answers(folder, [prompts], **plain)
    alone = [0, 1, 2, 17, 31]
    assert answers(folder, [[prompts[i]] for i in alone], **plain) == [together[i] for i in alone]
    assert answers(folder, [prompts], **plain, max_num_batched_tokens=48) == together
    again = answers(folder, [prompts, prompts], quantization=quantization, enable_prefix_caching=True)
    assert again[:32] == together and again[32:] == together
