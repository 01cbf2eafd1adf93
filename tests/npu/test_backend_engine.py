"""The whole engine on ``device="npu"``: torch-npu's own host layer, with emulated kernels.

Tokens are held against transformers on the CPU, in float32: each must be the likeliest after what the engine itself has
generated before it, or so close to it that 16 bits cannot tell.
"""

from __future__ import annotations

import copy
import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_checkpoint, reference_logits

from nanovllm import LLM, SamplingParams
from nanovllm.errors import ParameterError

emulated = pytest.mark.emulated
schedules = pytest.mark.parametrize(
    "schedule",
    [
        pytest.param("at once", marks=pytest.mark.emulated),
        pytest.param("lazy, seed 1", marks=pytest.mark.emulated(lazy=1, seed=1)),
        pytest.param("lazy, seed 2", marks=pytest.mark.emulated(lazy=1, seed=2)),
    ],
)

_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "max_position_embeddings": 1024}
_SHARED = [(11 * i) % 120 + 3 for i in range(40)]
PROMPTS: list[list[int]] = [
    [5],
    [11, 3, 120],
    [*_SHARED, 7, 8],
    [(7 * i) % 129 + 1 for i in range(100)],
    [*_SHARED, 9],
    [7, 7, 7, 99, 2, 64],
]
_TIE = 0.05  # of logits with a deviation of about 1


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes checkpoints: (folder, the transformers model in float32), each once."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(family: str, head_dim: int, **changes: Any) -> tuple[Path, Any]:
        key = f"{family}-{head_dim}-{changes}"
        if key not in made:
            path = tmp_path_factory.mktemp("model")
            model = make_checkpoint(path, family, dtype=torch.float16, head_dim=head_dim, **{**_SIZES, **changes})
            made[key] = path, model.float()
        return made[key]

    return make


def greedy(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens, of another number for each prompt."""
    params = [
        SamplingParams(temperature=0.0, max_tokens=8 + i, ignore_eos=True, detokenize=False)
        for i in range(len(prompts))
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def generate(path: Path, prompts: list[list[int]] | None = None, **options: Any) -> list[list[int]]:
    """``greedy`` on the NPU."""
    prompts = PROMPTS if prompts is None else prompts
    settings = {"max_num_seqs": 4, "num_gpu_blocks_override": 60, "max_model_len": 256, "block_size": 16}
    with LLM(str(path), device="npu", skip_tokenizer_init=True, **{**settings, **options}) as llm:
        tokens = greedy(llm, prompts)
    gc.collect()
    return tokens


def assert_likeliest(model: Any, tokens: list[list[int]], prompts: list[list[int]] | None = None) -> None:
    """Every token is the likeliest by the transformers model, or almost."""
    for i, (prompt, generated) in enumerate(zip(PROMPTS if prompts is None else prompts, tokens, strict=True)):
        assert len(generated) == 8 + i
        logits = reference_logits(model, [*prompt, *generated])[len(prompt) - 1 : -1]
        behind = logits.amax(-1) - logits.gather(1, torch.tensor(generated)[:, None])[:, 0]
        assert behind.max() < _TIE, (i, behind.tolist())


# ---- families, head sizes, number formats ---------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize(
    ("family", "head_dim", "options"),
    [
        ("qwen3", 128, {}),
        ("llama", 128, {"dtype": "bfloat16"}),
        ("qwen3", 64, {"block_size": 128}),
        ("qwen2", 80, {"block_size": 128}),
        ("mistral", 128, {"window": 24}),
        ("mistral", 64, {"window": 24, "block_size": 128}),
        ("llama", 10, {}),
        ("qwen3", 128, {"dtype": "float32"}),
    ],
)
def test_greedy_tokens_are_those_of_transformers(
    models: Any, family: str, head_dim: int, options: dict[str, Any], eager: bool
) -> None:
    options = dict(options)
    window = options.pop("window", None)
    path, model = models(family, head_dim, **({} if window is None else {"sliding_window": window}))
    tokens = generate(path, enforce_eager=eager, **options)
    if options.get("dtype") == "bfloat16":  # the model that is compared with has rounded to it, too
        model = type(model)(model.config).load_state_dict(model.state_dict()) and model.bfloat16().float()
    assert_likeliest(model, tokens)


@emulated
def test_tokens_are_those_of_the_cpu(models: Any) -> None:
    path, _ = models("qwen3", 128)
    settings: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 4, "max_model_len": 256}
    with LLM(str(path), device="cpu", skip_tokenizer_init=True, num_gpu_blocks_override=60, **settings) as llm:
        params = [
            SamplingParams(temperature=0.0, max_tokens=8 + i, ignore_eos=True, detokenize=False) for i in range(6)
        ]
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    assert generate(path, dtype="float32") == [list(output.outputs[0].token_ids) for output in outputs]


# ---- scheduling -----------------------------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize(
    "options",
    [
        {"enable_prefix_caching": False},
        {"enable_prefix_caching": True, "max_num_seqs": 2},  # later prompts find the blocks of earlier ones
        {"max_num_batched_tokens": 24},  # chunks, in batches with decodes
        {"enable_chunked_prefill": False},
        {"num_gpu_blocks_override": 14, "enable_prefix_caching": False},  # preemption
        {"async_scheduling": False},
        {"block_size": 128},
    ],
    ids=str,
)
def test_scheduling_does_not_change_tokens(models: Any, options: dict[str, Any]) -> None:
    path, model = models("qwen3", 128)
    assert_likeliest(model, generate(path, **options))


@pytest.mark.parametrize("soc", [pytest.param(soc, marks=emulated(soc=soc)) for soc in ("Ascend910B2", "Ascend310P3")])
def test_memory_decides_how_many_blocks_there_are(models: Any, soc: str) -> None:
    """The largest step is tried at the start; the cache takes what it leaves of the share of the device's memory."""
    path, model = models("qwen3", 128)
    settings: dict[str, Any] = {"max_num_batched_tokens": 300, "max_model_len": 200, "max_num_seqs": 4}
    before = torch.npu.memory_allocated()
    with LLM(str(path), device="npu", skip_tokenizer_init=True, gpu_memory_utilization=0.5, **settings) as llm:
        executor: Any = llm.llm_engine.core.executor
        assert executor.num_blocks == 4 * 2 + 1  # more could never be used
        assert executor.kv_cache_bytes <= torch.npu.memory_allocated() - before < 2**30
        assert_likeliest(model, greedy(llm, PROMPTS))
    gc.collect()
    assert torch.npu.memory_allocated() <= before + 2**20  # closing gives it back


@emulated
def test_outputs_share_a_prompt_and_its_last_block_is_copied(models: Any) -> None:
    path, _ = models("qwen3", 128)
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=6, ignore_eos=True, detokenize=False)
    found = []
    for eager in (True, False):
        settings: dict[str, Any] = {"num_gpu_blocks_override": 60, "max_model_len": 256, "enforce_eager": eager}
        with LLM(str(path), device="npu", skip_tokenizer_init=True, **settings) as llm:
            outputs = llm.generate([{"prompt_token_ids": PROMPTS[2]}], params, use_tqdm=False)[0].outputs
        found.append([list(output.token_ids) for output in outputs])
    assert found[0] == found[1] and len({tuple(tokens) for tokens in found[0]}) == 3


# ---- graphs ---------------------------------------------------------------------------------------------------------


@schedules
def test_graphs_give_the_tokens_of_eager_steps(models: Any, schedule: str) -> None:
    """Buckets fill, empty and fill again; lengths grow, rows move to other blocks."""
    path, model = models("qwen3", 128)
    graphs = generate(path, max_num_seqs=6)
    assert graphs == generate(path, max_num_seqs=6, enforce_eager=True)
    assert_likeliest(model, graphs)


@emulated
def test_steps_are_recorded_once_and_replayed(models: Any, caplog: pytest.LogCaptureFixture) -> None:
    path, _ = models("qwen3", 128)
    logging.getLogger("nanovllm").propagate = True
    with caplog.at_level(logging.INFO, logger="nanovllm"):
        generate(path)
    recorded = [line for line in caplog.messages if line.startswith("Recorded decode steps")]
    assert recorded and len(recorded) == len({line.partition(":")[0] for line in recorded})
    assert "npu: emulated, torch_npu 2.13.0" in caplog.messages


@emulated
def test_a_forgotten_update_of_lengths_would_be_noticed(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = models("qwen3", 128)
    eager = generate(path, enforce_eager=True)
    update = torch.npu.NPUGraph.update
    stale: dict[int, Any] = {}

    def update_once(graph: Any, cpu_update_input: Any) -> None:
        update(graph, stale.setdefault(id(graph), cpu_update_input))

    monkeypatch.setattr(torch.npu.NPUGraph, "update", update_once)
    assert generate(path) != eager


@pytest.mark.parametrize(
    "some", [pytest.param(False, marks=emulated(streams=24)), pytest.param(True, marks=emulated(streams=36))]
)
def test_without_streams_for_graphs_steps_are_launched(
    models: Any, some: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """None at all, or not for all buckets."""
    path, model = models("qwen3", 128)
    logging.getLogger("nanovllm").propagate = True
    prompts = [[3 + i, 5, 7] for i in range(17)]
    with caplog.at_level(logging.INFO, logger="nanovllm"):
        tokens = generate(path, prompts, max_num_seqs=17)
    assert_likeliest(model, tokens, prompts)
    said = [line for line in caplog.messages if "launched kernel by kernel from now on" in line]
    assert len(said) == 1 and "no streams left" in said[0], caplog.messages
    assert any(line.startswith("Recorded") for line in caplog.messages) is some


# ---- sampling -------------------------------------------------------------------------------------------------------


@emulated
def test_drawn_tokens_depend_on_the_request_alone(models: Any) -> None:
    path, _ = models("qwen3", 128)
    kinds = [{"temperature": 0.0}, {"top_p": 0.8, "logprobs": 2}, {"top_k": 5, "min_p": 0.05}, {"temperature": 1.3}]
    params = [
        SamplingParams(max_tokens=6, ignore_eos=True, detokenize=False, **{"temperature": 0.9, "seed": i, **kind})
        for i, kind in enumerate(kinds)
    ]
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS[:4]]
    with LLM(str(path), device="npu", skip_tokenizer_init=True, num_gpu_blocks_override=60, max_model_len=256) as llm:
        together = llm.generate(prompts, params, use_tqdm=False)
        for i in (1, 2, 3):
            alone = llm.generate(prompts[i : i + 1], params[i : i + 1], use_tqdm=False)
            assert alone[0].outputs[0].token_ids == together[i].outputs[0].token_ids
    scored = together[1].outputs[0].logprobs
    assert scored is not None and all(position[token].logprob <= 0.0 for token, position in
                                      zip(together[1].outputs[0].token_ids, scored, strict=True))  # fmt: skip


@emulated
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_a_step_asks_the_device_for_nothing_but_the_sampled_tokens(models: Any, eager: bool) -> None:
    """torch_npu raises when anything waits for the device, but for the event behind the copy of the tokens."""
    path, _ = models("qwen3", 128)
    kinds = [{"temperature": 0.0}, {"top_p": 0.8}, {"top_k": 5, "min_p": 0.05}, {"temperature": 1.3}]
    params = [
        SamplingParams(max_tokens=6, ignore_eos=True, detokenize=False, **{"temperature": 0.9, "seed": i, **kind})
        for i, kind in enumerate(kinds)
    ]
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS[:4]]
    settings: dict[str, Any] = {"num_gpu_blocks_override": 60, "max_model_len": 256, "enforce_eager": eager}
    with LLM(str(path), device="npu", skip_tokenizer_init=True, enable_prefix_caching=False, **settings) as llm:
        wanted = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
        torch.npu.set_sync_debug_mode("error")
        try:
            with pytest.raises(RuntimeError):
                torch.ones(1, device="npu").item()
            tokens = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
        finally:
            torch.npu.set_sync_debug_mode("default")
    assert tokens == wanted


# ---- what is refused ------------------------------------------------------------------------------------------------


@emulated
def test_blocks_that_do_not_fit_the_heads_are_refused_at_the_start(models: Any) -> None:
    path, _ = models("qwen3", 64)
    with pytest.raises(ParameterError, match="need blocks of 128"):
        generate(path, block_size=16)
    with pytest.raises(ParameterError, match="multiple of 16"):
        generate(path, block_size=100)
    with pytest.raises(ParameterError, match="use 'int8' or leave it out"):
        generate(path, block_size=128, quantization="w8a8")


@pytest.mark.parametrize("soc", [pytest.param(soc, marks=emulated(soc=soc)) for soc in ("Ascend910B2", "Ascend310P3")])
@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_weights_in_8_bits_give_the_tokens_of_the_rounded_model(models: Any, family: str, soc: str) -> None:
    """transformers computes with the same weights, rounded here; those with biases, too."""
    path, model = models(family, 128)
    tokens = generate(path, quantization="int8", dtype="float16", block_size=128)
    rounded = copy.deepcopy(model)
    for name, parameter in rounded.named_parameters():
        if parameter.dim() == 2:
            scale = (parameter.data.abs().amax(1, keepdim=True) / 127).half().float()
            parameter.data = (parameter.data / scale).round() * scale
        assert parameter.dtype == torch.float32, name
    assert_likeliest(rounded, tokens)


# ---- 310P -----------------------------------------------------------------------------------------------------------

on_310p = pytest.mark.emulated(soc="Ascend310P3")


@on_310p
@pytest.mark.parametrize(
    ("family", "head_dim", "options"),
    [
        ("qwen3", 128, {}),
        ("llama", 128, {"block_size": 64, "max_num_batched_tokens": 24}),
        ("qwen2", 80, {"enforce_eager": True, "num_gpu_blocks_override": 8}),
        ("mistral", 128, {"window": 24}),  # prompts, decodes and mixtures beyond the window
        ("mistral", 64, {"window": 64, "max_num_batched_tokens": 24}),
    ],
)
def test_a_310p_gives_the_tokens_of_transformers(
    models: Any, family: str, head_dim: int, options: dict[str, Any]
) -> None:
    options = dict(options)
    window = options.pop("window", None)
    path, model = models(family, head_dim, **({} if window is None else {"sliding_window": window}))
    assert_likeliest(model, generate(path, **{"block_size": 128, "dtype": "auto", **options}))


@on_310p
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "use float16"),
        ({"block_size": 16}, "64 or 128"),
        ({"attention_backend": "torch_native"}, "only this device's own attention"),
    ],
)
def test_a_310p_refuses_what_it_has_not(models: Any, options: dict[str, Any], message: str) -> None:
    path, _ = models("qwen3", 128)
    with pytest.raises(ParameterError, match=message):
        generate(path, **{"block_size": 128, **options})


@on_310p
def test_a_310p_says_once_that_it_has_no_graphs(models: Any, caplog: pytest.LogCaptureFixture) -> None:
    path, _ = models("llama", 128)
    logging.getLogger("nanovllm").propagate = True
    for eager in (False, True):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="nanovllm"):
            generate(path, PROMPTS[:1], block_size=64, enforce_eager=eager)
        assert sum("has no graphs" in line for line in caplog.messages) == (not eager)
        assert not any(line.startswith("Recorded") for line in caplog.messages)
