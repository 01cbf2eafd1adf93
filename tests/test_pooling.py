"""Vectors of texts: equal to transformers' hidden states however the work is cut, from every kind of checkpoint."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_checkpoint
from tiny_tokenizers import qwen

from nanovllm import LLM, AsyncEngineArgs, AsyncLLM, PoolingParams, SamplingParams
from nanovllm.engine.invariants import InvariantChecker
from nanovllm.errors import ModelError, ParameterError

VOCAB_SIZE, IM_END, HIDDEN = 337, 332, 48
PROMPTS: list[list[int]] = [[5 + (7 * i + j * j) % 300 for j in range(n)] for i, n in enumerate((1, 2, 9, 40, 70))]


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, reference: dict[str, Any]) -> Path:
    path = tmp_path_factory.mktemp("model")
    options = {"vocab_size": VOCAB_SIZE, "eos_token_id": IM_END, "tie_word_embeddings": True}
    reference["model"] = make_checkpoint(path, "qwen3", **options)
    qwen(path)
    return path


def make_llm(folder: Path, **options: Any) -> LLM:
    llm = LLM(str(folder), **{"num_gpu_blocks_override": 64, "block_size": 8, "max_model_len": 128, **options})
    llm.llm_engine.core.checker = InvariantChecker(llm.llm_engine.core.scheduler)
    return llm


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with make_llm(folder) as llm:
        yield llm
        assert llm.llm_engine.core.checker is not None
        llm.llm_engine.core.checker.idle()


@torch.no_grad()
def expected(reference: dict[str, Any], prompt: list[int], method: str = "last") -> np.ndarray:
    """The vector by transformers: the hidden states behind the last norm, pooled, of length 1."""
    hidden = reference["model"].model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0].float()
    vector = hidden.mean(0) if method == "mean" else hidden[-1]
    return (vector / vector.norm()).numpy()


def vectors(llm: LLM, prompts: list[Any], params: PoolingParams | None = None) -> list[np.ndarray]:
    return [output.outputs.data for output in llm.encode(prompts, params, use_tqdm=False)]


CUTS: list[dict[str, Any]] = [
    {},
    {"max_num_batched_tokens": 16, "max_num_seqs": 4},
    {"max_num_batched_tokens": 16, "max_num_seqs": 4, "async_scheduling": True},
    {"num_gpu_blocks_override": 14, "max_model_len": 96},
    {"enable_prefix_caching": False},
    {"max_num_seqs": 1},
]


@pytest.mark.parametrize("method", ["last", "mean"])
@pytest.mark.parametrize("options", CUTS, ids=lambda options: "-".join(options) or "plain")
def test_vectors_equal_transformers_however_the_work_is_cut(
    folder: Path, reference: dict[str, Any], method: str, options: dict
):
    with make_llm(folder, pooler_config={"pooling_type": method.upper()}, **options) as llm:
        for _ in range(2):  # the second time with a warm prefix cache
            for vector, prompt in zip(vectors(llm, PROMPTS), PROMPTS, strict=True):
                assert vector.dtype == np.float32
                np.testing.assert_allclose(vector, expected(reference, prompt, method), atol=1e-5)
        llm.llm_engine.core.checker.idle()  # type: ignore[union-attr]


def test_vectors_and_texts_share_steps_and_cache(llm: LLM, reference: dict[str, Any]):
    engine, greedy = llm.llm_engine, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    alone = [output.token_ids for output in llm.generate(PROMPTS, greedy, use_tqdm=False)]
    llm.reset_prefix_cache()
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(f"text-{number}", prompt, greedy)
        engine.add_request(f"vector-{number}", prompt, PoolingParams())
    done: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        done |= {output.request_id: output for output in engine.step() if output.finished}
    for number, prompt in enumerate(PROMPTS):
        assert done[f"text-{number}"].token_ids == alone[number]
        np.testing.assert_allclose(done[f"vector-{number}"].outputs.data, expected(reference, prompt), atol=1e-5)
    (again,) = llm.encode([PROMPTS[-1]], use_tqdm=False)
    assert again.num_cached_tokens == 64


def test_a_mean_reads_no_cache_but_its_prompt_can_be_read(folder: Path):
    with make_llm(folder, pooler_config={"pooling_type": "MEAN"}) as llm:
        for _ in range(2):
            (output,) = llm.encode([PROMPTS[-1]], use_tqdm=False)
            assert output.num_cached_tokens == 0
        (text,) = llm.generate([PROMPTS[-1]], SamplingParams(max_tokens=1), use_tqdm=False)
        assert text.num_cached_tokens == 64


def test_embed_hands_out_lists(llm: LLM):
    (output,) = llm.embed("hello", use_tqdm=False)
    assert output.finished and output.outputs.hidden_size == len(output.outputs.embedding) == HIDDEN
    assert all(type(value) is float for value in output.outputs.embedding)
    assert output.prompt_token_ids == llm.get_tokenizer().encode("hello")
    assert output.metrics is not None and output.metrics.last_token_ts > output.metrics.arrival_ts


def test_dimensions_are_cut_before_the_length_is_made_one(llm: LLM):
    (raw,) = vectors(llm, ["hello"], PoolingParams(use_activation=False))
    (cut,) = vectors(llm, ["hello"], PoolingParams(dimensions=8))
    assert len(raw) == HIDDEN and not np.isclose(np.linalg.norm(raw), 1.0)
    np.testing.assert_allclose(cut, raw[:8] / np.linalg.norm(raw[:8]), rtol=1e-6)
    assert [len(v) for v in llm_sizes(llm, [3, 48])] == [3, 48]


def llm_sizes(llm: LLM, sizes: list[int]) -> list[np.ndarray]:
    params = [PoolingParams(dimensions=size) for size in sizes]
    return [output.outputs.data for output in llm.encode(["a"] * len(sizes), params, use_tqdm=False)]


@pytest.mark.parametrize("dimensions", [0, -1, HIDDEN + 1, 1.5, True])
def test_impossible_dimensions_are_refused(llm: LLM, dimensions: Any):
    with pytest.raises(ParameterError, match="dimensions"):
        vectors(llm, ["hello"], PoolingParams(dimensions=dimensions))


def test_a_text_may_fill_the_context_and_no_more(llm: LLM):
    assert len(vectors(llm, [[7] * 128])) == 1
    with pytest.raises(ParameterError, match="128"):
        vectors(llm, ["x", [7] * 129])
    assert not llm.llm_engine.core.scheduler.requests


def test_other_tasks_are_refused(llm: LLM):
    with pytest.raises(ParameterError, match="classify"):
        llm.encode("x", pooling_task="classify")
    with pytest.raises(ParameterError, match="runner"):
        make_llm(llm.llm_engine.model_config.path, runner="draft")
    with pytest.raises(ParameterError, match="pooling_type"):
        make_llm(llm.llm_engine.model_config.path, pooler_config={"pooling_type": "CLS"})


def test_vectors_without_finite_numbers_end_with_an_error(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    runner = llm.llm_engine.core.executor._runner  # type: ignore[attr-defined]
    monkeypatch.setattr(runner.pooler, "pool", lambda plan, *_: torch.full((len(plan.pooled), HIDDEN), torch.nan))
    llm.llm_engine.add_request("bad", "hello", PoolingParams())
    (output,) = llm.llm_engine.step()
    assert output.outputs[0].finish_reason == "error" and "finite" in output.outputs[0].stop_reason


def test_the_async_engine_embeds_and_generates_side_by_side(folder: Path, reference: dict[str, Any]):
    async def main() -> None:
        args = AsyncEngineArgs(model=str(folder), num_gpu_blocks_override=64, block_size=8, max_model_len=128)
        engine = AsyncLLM.from_engine_args(args)

        async def embed(number: int) -> Any:
            outputs = [output async for output in engine.encode(PROMPTS[number], None, f"v{number}")]
            assert len(outputs) == 1
            return outputs[0]

        async def generate() -> str:
            params = SamplingParams(max_tokens=4, temperature=0.0)
            return [output async for output in engine.generate("hello", params, "t")][-1].text

        *found, text = await asyncio.gather(*map(embed, range(len(PROMPTS))), generate())
        for output, prompt in zip(found, PROMPTS, strict=True):
            np.testing.assert_allclose(output.outputs.data, expected(reference, prompt), atol=1e-5)
        assert isinstance(text, str) and not engine.output.num_requests
        with pytest.raises(ParameterError, match="dimensions"):
            await engine.encode("x", PoolingParams(dimensions=1000), "bad").__anext__()
        engine.shutdown()

    asyncio.run(main())


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture
def embedder(folder: Path, tmp_path: Path) -> Path:
    """A checkpoint as embedding models are published: no head, no prefix, sentence-transformers' files beside it."""
    path = tmp_path / "embedder"
    shutil.copytree(folder, path)
    weights = load_file(path / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.")}
    save_file(bare, path / "model.safetensors", metadata={"format": "pt"})
    add_modules(path, "Transformer", "Pooling", "Normalize")
    (path / "1_Pooling").mkdir()
    modes = {"word_embedding_dimension": HIDDEN, "pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    return path


def add_modules(path: Path, *kinds: str) -> None:
    modules = [
        {"idx": i, "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Qwen3Model"])
def test_an_embedding_checkpoint_is_served_as_it_is_published(
    embedder: Path, reference: dict[str, Any], architecture: str
):
    overrides = {"architectures": [architecture]}
    with make_llm(embedder, hf_overrides=overrides) as llm:
        for vector, prompt in zip(vectors(llm, PROMPTS), PROMPTS, strict=True):
            np.testing.assert_allclose(vector, expected(reference, prompt), atol=1e-5)
        with pytest.raises(ParameterError, match="does not generate"):
            llm.generate("hello", use_tqdm=False)


def test_a_bare_decoder_needs_no_other_files(embedder: Path, reference: dict[str, Any]):
    (embedder / "modules.json").unlink()
    with make_llm(embedder, hf_overrides={"architectures": ["Qwen3Model"], "tie_word_embeddings": False}) as llm:
        np.testing.assert_allclose(vectors(llm, [PROMPTS[2]])[0], expected(reference, PROMPTS[2]), atol=1e-5)


def test_the_pooling_of_a_checkpoint_is_followed_and_can_be_overridden(embedder: Path, reference: dict[str, Any]):
    add_modules(embedder, "Transformer", "Pooling")
    (embedder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    with make_llm(embedder) as llm:
        (vector,) = vectors(llm, [PROMPTS[3]])
        assert not np.isclose(np.linalg.norm(vector), 1.0)
        unit = vector / np.linalg.norm(vector)
        np.testing.assert_allclose(unit, expected(reference, PROMPTS[3], "mean"), atol=1e-5)
    changes = {"pooling_type": "LAST", "normalize": True, "dimensions": 16}
    with make_llm(embedder, pooler_config=changes, runner="generate") as llm:
        (vector,) = vectors(llm, [PROMPTS[3]])
        want = expected(reference, PROMPTS[3])[:16]
        np.testing.assert_allclose(vector, want / np.linalg.norm(want), atol=1e-5)
        assert llm.generate("hello", SamplingParams(max_tokens=2), use_tqdm=False)[0].finished


def test_sizes_a_checkpoint_names_are_the_only_ones(embedder: Path):
    with make_llm(embedder, hf_overrides={"matryoshka_dimensions": [8, 16]}) as llm:
        assert len(vectors(llm, ["a"], PoolingParams(dimensions=16))[0]) == 16
        with pytest.raises(ParameterError, match=r"\(8, 16\)"):
            vectors(llm, ["a"], PoolingParams(dimensions=12))


@pytest.mark.parametrize("kind", ["Dense", "CLS"])
def test_checkpoints_that_pool_in_another_way_are_refused(embedder: Path, kind: str):
    if kind == "Dense":
        add_modules(embedder, "Transformer", "Pooling", "Dense")
    else:
        (embedder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    with pytest.raises(ModelError, match=kind.lower() if kind == "CLS" else kind):
        make_llm(embedder)
