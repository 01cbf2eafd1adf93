"""Every family, with every kind of RoPE, against transformers: logits at all positions, and greedy tokens."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from paged import load_model, run_paged
from tiny_models import FAMILIES, ROPES, make_checkpoint, reference_logits, save_checkpoint, tiny_config, tiny_model
from torch import Tensor

from nanovllm.errors import ModelError, ParameterError
from nanovllm.models import build_model
from nanovllm.ops import operator_table, torch_operators
from nanovllm.parallel import ParallelContext

# float32 logits of deviation 1 to 2, through two layers whose products are summed in another order.
TOLERANCE = 2e-5


def make_prompts(lengths: tuple[int, ...] = (1, 19, 4, 33, 8), vocab: int = 131, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(vocab) for _ in range(length)] for length in lengths]


def assert_equals_reference(
    reference: Any,
    model: Any,
    prompts: list[list[int]],
    *,
    chunk: int,
    max_tokens: int = 6,
    tolerance: float = TOLERANCE,
) -> None:
    """Run the prompts as one ragged batch; compare all logits, and the greedy choice after each position."""
    outputs, logits = run_paged(model, prompts, chunk=chunk, max_tokens=max_tokens)
    for prompt, output, ours in zip(prompts, outputs, logits, strict=True):
        theirs = reference_logits(reference, prompt + output[:-1])
        assert (ours - theirs).abs().max() < TOLERANCE
        assert output == theirs[len(prompt) - 1 :].argmax(-1).tolist()


SHAPES: list[dict[str, Any]] = [
    {},  # GQA 3:1, untied, head_dim 10 with hidden 48 and 6 heads
    {"num_key_value_heads": 1, "tie_word_embeddings": True},  # MQA
    {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True, "num_hidden_layers": 3},
    {"num_attention_heads": 8, "hidden_size": 40, "intermediate_size": 34, "attention_bias": True, "mlp_bias": True},
]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_equal_transformers(family: str, rope: str, tmp_path: Path) -> None:
    case = list(ROPES).index(rope) + FAMILIES.index(family)
    style = "v4" if case % 2 else "v5"
    reference = make_checkpoint(tmp_path, family, rope, seed=case, config_style=style, **SHAPES[case % len(SHAPES)])
    model = load_model(tmp_path)
    for chunk in (1, 7, 64):
        assert_equals_reference(reference, model, make_prompts(seed=case), chunk=chunk)


@pytest.mark.parametrize("style", ["v4", "v5"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_shape_in_every_family(family: str, shape: dict[str, Any], style: str, tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, family, "llama3", config_style=style, **shape)
    assert_equals_reference(reference, load_model(tmp_path), make_prompts(), chunk=7)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_test_models_depend_on_their_whole_context(family: str, tied: bool, tmp_path: Path) -> None:
    """Otherwise the parity tests would not see a fault in attention."""
    make_checkpoint(tmp_path, family, tie_word_embeddings=tied)
    model = load_model(tmp_path)
    prompt = make_prompts((24,))[0]
    (first,), (logits,) = run_paged(model, [prompt], chunk=64, max_tokens=12)
    (second,), (changed,) = run_paged(model, [[(prompt[0] + 1) % 131, *prompt[1:]]], chunk=64, max_tokens=12)
    assert (logits[len(prompt) - 1] - changed[len(prompt) - 1]).abs().max() > 0.1
    assert first != second


@pytest.mark.parametrize("backend", ["torch_native", "reference"])
@pytest.mark.parametrize("window", [1, 5, 16])
def test_mistral_slides_in_every_layer(window: int, backend: str, tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "mistral", sliding_window=window)
    model = load_model(tmp_path, attention_backend=backend)
    for chunk in (1, 7, 64):
        assert_equals_reference(reference, model, make_prompts(), chunk=chunk)


def test_mistral_without_a_window_in_its_config_has_the_window_of_its_first_version() -> None:
    config = {k: v for k, v in tiny_config("mistral").to_dict().items() if k != "sliding_window"}
    assert build(config, "MistralForCausalLM").windows == (4096,)


@pytest.mark.parametrize(
    "options",
    [
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 6},
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        {"use_sliding_window": False, "sliding_window": 3, "max_window_layers": 0},
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_layers_slide_where_the_config_says(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, family, num_hidden_layers=3, **options)
    # transformers 5 writes layer_types in full; older checkpoints have only max_window_layers.
    model = load_model(tmp_path, **{"layer_types": None, **options})
    for chunk in (1, 7, 64):
        assert_equals_reference(reference, model, make_prompts(), chunk=chunk)


def test_qwen3_without_head_dim_has_heads_of_128() -> None:
    config = {k: v for k, v in tiny_config("qwen3").to_dict().items() if k != "head_dim"}
    assert build(config, "Qwen3ForCausalLM").head_dim == 128


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "gelu_new"])
def test_other_gated_activations(activation: str, tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "llama", hidden_act=activation)
    assert_equals_reference(reference, load_model(tmp_path), make_prompts(), chunk=7)


def test_dynamic_rope_beyond_the_trained_length_is_that_of_the_longest_sequence(tmp_path: Path) -> None:
    """One base for max_model_len: what transformers uses for a sequence of just that length, computed at once."""
    reference = make_checkpoint(tmp_path, "llama", "dynamic", max_position_embeddings=32)
    model = load_model(tmp_path, max_model_len=64)
    prompts = make_prompts((60, 60))
    for chunk in (7, 64):
        assert_equals_reference(reference, model, prompts, chunk=chunk, max_tokens=5)


def test_longrope_takes_the_long_factors_when_long_sequences_are_allowed(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "llama", "longrope")  # original length 64
    model = load_model(tmp_path, max_model_len=65)
    prompts = make_prompts((64, 64))  # transformers takes them from 65 tokens on
    _, logits = run_paged(model, prompts, chunk=7, max_tokens=2)
    short = load_model(tmp_path, max_model_len=64)
    _, other = run_paged(short, prompts, chunk=7, max_tokens=1)
    theirs = reference_logits(reference, prompts[0])
    assert (other[0] - theirs).abs().max() < TOLERANCE
    assert (logits[0][:64] - theirs).abs().max() > 0.1
    assert_equals_reference(reference, model, prompts, chunk=7, max_tokens=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_close_to_float32_as_transformers_in_bfloat16(family: str, tmp_path: Path) -> None:
    """Tolerance: no more than 1.5 times the error transformers itself makes in bfloat16, on the same weights."""
    half = make_checkpoint(tmp_path, family, dtype=torch.bfloat16)
    exact = make_checkpoint(tmp_path / "32", family)
    exact.load_state_dict({name: weight.float() for name, weight in half.state_dict().items()})
    prompt = make_prompts((48,))[0]
    truth, theirs = reference_logits(exact, prompt), reference_logits(half, prompt)
    model = load_model(tmp_path, dtype=torch.bfloat16)
    for chunk in (1, 7, 64):
        _, (ours,) = run_paged(model, [prompt], chunk=chunk, max_tokens=1)
        assert (ours - truth).std() < 1.5 * (theirs - truth).std()


def test_chunks_batches_and_blocks_do_not_change_the_result(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3")
    model = load_model(tmp_path)
    prompts = make_prompts()
    alone = [run_paged(model, [prompt], chunk=64, max_tokens=8)[0][0] for prompt in prompts]
    for chunk, block_size, seed in ((1, 1, 1), (5, 3, 2), (16, 16, 3)):
        assert run_paged(model, prompts, chunk=chunk, max_tokens=8, block_size=block_size, seed=seed)[0] == alone


def test_the_forward_pass_never_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No .item(), .tolist() or truth value of a tensor in the layers: on a device each would stop the pipeline."""
    make_checkpoint(tmp_path, "mistral", sliding_window=6)
    model = load_model(tmp_path)
    inside = False

    def guarded(name: str) -> Any:
        original = getattr(Tensor, name)

        def guard(self: Tensor, *args: Any) -> Any:
            assert not inside, f"Tensor.{name} within forward"
            return original(self, *args)

        return guard

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "nonzero"):
        monkeypatch.setattr(Tensor, name, guarded(name))
    forward = model.forward

    def watched(*args: Any) -> Tensor:
        nonlocal inside
        inside = True
        try:
            return forward(*args)
        finally:
            inside = False

    monkeypatch.setattr(model, "forward", watched)
    run_paged(model, make_prompts(), chunk=7, max_tokens=3)


def test_a_tied_head_shares_the_storage_of_the_embedding(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3", tie_word_embeddings=True)
    for ops in (torch_operators(), operator_table("cpu")):
        model = load_model(tmp_path, ops=ops)
        assert model.head.shard is model.embedding.shard


# ---- configurations that cannot be served -------------------------------------------------------------------------


def build(config: dict[str, Any], architecture: str, parallel: ParallelContext | None = None) -> Any:
    return build_model(
        config,
        architecture,
        dtype=torch.float32,
        device="cpu",
        ops=operator_table("cpu"),
        parallel=parallel or ParallelContext(),
        max_model_len=64,
    )


def test_an_unknown_architecture_is_named_and_the_known_ones_are_listed() -> None:
    with pytest.raises(ModelError, match=r"'BertForMaskedLM' is not supported.*LlamaForCausalLM.*Qwen3ForCausalLM"):
        build({}, "BertForMaskedLM")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"num_key_value_heads": 4}, "not a multiple"),
        ({"head_dim": 9}, "even head_dim"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "'spiral' is not supported; known: default"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'linear' needs 'factor'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"rope_parameters": {**ROPES["longrope"], "short_factor": [1.0]}}, "short_factor has 1 entries"),
    ],
)
def test_a_config_that_cannot_be_served_says_why(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build({**tiny_config("qwen3").to_dict(), **change}, "Qwen3ForCausalLM")


# ---- tensor parallelism, its ranks as threads of this process -----------------------------------------------------


class Peers:
    """The shared side of ranks that run as threads."""

    def __init__(self, world: int) -> None:
        self.parts: list[Any] = [None] * world
        self.barrier = threading.Barrier(world)


@dataclass(frozen=True)
class ThreadContext(ParallelContext):
    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.group.parts[self.rank] = x
        self.group.barrier.wait(timeout=30)
        parts = [part.clone() for part in self.group.parts]
        self.group.barrier.wait(timeout=30)
        return parts

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._exchange(x)).sum(0))

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x), -1)


@pytest.mark.parametrize(
    ("family", "world", "shape"),
    [
        ("llama", 2, {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", 3, {"num_key_value_heads": 3}),
        ("qwen3", 4, {"num_attention_heads": 8, "tie_word_embeddings": True}),  # 2 KV heads on 4 ranks
        ("mistral", 8, {"num_attention_heads": 8, "num_key_value_heads": 1, "sliding_window": 6, "vocab_size": 13}),
    ],
)
def test_ranks_together_compute_what_one_computes(
    family: str, world: int, shape: dict[str, Any], tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, family, **shape)
    prompts = make_prompts(vocab=shape.get("vocab_size", 131))
    tokens, logits = run_paged(load_model(tmp_path), prompts, chunk=7, max_tokens=4)
    peers, results = Peers(world), [None] * world

    def rank(number: int) -> None:
        model = load_model(tmp_path, parallel=ThreadContext(number, world, peers))
        results[number] = run_paged(model, prompts, chunk=7, max_tokens=4)  # type: ignore[call-overload]

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert result is not None
        assert result[0] == tokens
        for ours, whole in zip(result[1], logits, strict=True):
            assert ours.shape == whole.shape
            assert (ours - whole).abs().max() < TOLERANCE


@pytest.mark.parametrize(("world", "what"), [(4, "6 query heads and 2 KV heads"), (5, "6 query heads")])
def test_a_world_the_heads_cannot_be_split_over_is_refused(world: int, what: str) -> None:
    with pytest.raises(ParameterError, match=what) as caught:
        build(tiny_config("llama").to_dict(), "LlamaForCausalLM", ParallelContext(0, world))
    assert (caught.value.parameter, caught.value.value) == ("tensor_parallel_size", world)


def test_the_units_of_the_mlp_must_split_evenly() -> None:
    with pytest.raises(ParameterError, match="71 units"):
        build(tiny_config("llama", intermediate_size=71).to_dict(), "LlamaForCausalLM", ParallelContext(0, 2))


def _gloo_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = load_model(Path(folder), parallel=ParallelContext(rank, 2))
    tokens, _ = run_paged(model, make_prompts(), chunk=7, max_tokens=4)
    Path(folder, f"tokens-{rank}").write_text(repr(tokens))
    torch.distributed.destroy_process_group()


def test_two_processes_over_gloo_agree_with_one(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(tiny_config("qwen3")), tmp_path)
    expected = repr(run_paged(load_model(tmp_path), make_prompts(), chunk=7, max_tokens=4)[0])
    torch.multiprocessing.spawn(_gloo_rank, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    assert [Path(tmp_path, f"tokens-{rank}").read_text() for rank in range(2)] == [expected, expected]
