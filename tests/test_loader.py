"""Checkpoints that fit, and the many that do not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paged import load_model, run_paged
from safetensors.torch import load_file, save_file
from tiny_models import make_checkpoint, reference_logits
from torch import Tensor

from nanovllm.errors import ModelError
from nanovllm.models import build_model, loader
from nanovllm.models.tensor_file import TensorFile
from nanovllm.ops import torch_operators
from nanovllm.ops.cpu.library import supported_instruction_sets
from nanovllm.parallel import ParallelContext

PROMPT = list(range(20))


def logits_of(path: Path, **options: Any) -> Tensor:
    return run_paged(load_model(path, **options), [PROMPT], chunk=64, max_tokens=1)[1][0]


def change_weights(path: Path, change: dict[str, Tensor | None]) -> None:
    """Rewrite model.safetensors with tensors added or replaced, or (None) removed."""
    weights = {**load_file(path / "model.safetensors"), **change}
    save_file({name: weight for name, weight in weights.items() if weight is not None}, path / "model.safetensors")


def test_a_checkpoint_in_several_files_loads_like_one(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "qwen3", max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert (logits_of(tmp_path) - reference_logits(reference, PROMPT)).abs().max() < 2e-5


def test_files_beside_the_index_are_left_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3", max_shard_size="30KB")
    save_file({"another": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    load_model(tmp_path)


def test_a_lone_file_of_another_name_is_found(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    load_model(tmp_path)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_converted_to_the_dtype_of_the_model(stored: torch.dtype, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", dtype=stored)
    model = load_model(tmp_path, dtype=torch.bfloat16, ops=torch_operators())
    saved = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(model.layers[0].mlp.down.packed, saved.to(torch.bfloat16))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_missing_tensor_is_named(family: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, family)
    for name in load_file(tmp_path / "model.safetensors"):
        if ".layers.1." in name:
            continue
        kept = load_file(tmp_path / "model.safetensors")[name]
        change_weights(tmp_path, {name: None})
        with pytest.raises(ModelError, match=f"missing 1 tensors: {name}$"):
            load_model(tmp_path)
        change_weights(tmp_path, {name: kept})


def test_a_long_list_of_names_is_cut_short(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    change_weights(tmp_path, {f"extra.{number}": torch.zeros(1) for number in range(30)})
    with pytest.raises(ModelError, match=r"unexpected 30 tensors: extra.0, .* and 22 more$"):
        load_model(tmp_path)


def test_weights_the_model_has_no_place_for_are_an_error(tmp_path: Path) -> None:
    """A biased checkpoint behind a config that knows no bias would run, and be wrong."""
    make_checkpoint(tmp_path, "llama", attention_bias=True)
    with pytest.raises(ModelError, match=r"unexpected 8 tensors: model.layers.0.self_attn.k_proj.bias"):
        load_model(tmp_path, attention_bias=False)


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    change_weights(tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(5)})
    load_model(tmp_path)


def test_a_second_copy_of_a_tied_head_is_ignored_but_an_untied_head_must_be_there(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "qwen3", tie_word_embeddings=True)
    expected = reference_logits(reference, PROMPT)
    change_weights(tmp_path, {"lm_head.weight": torch.zeros(131, 48)})
    assert (logits_of(tmp_path) - expected).abs().max() < 2e-5
    assert logits_of(tmp_path, tie_word_embeddings=False).abs().max() == 0
    change_weights(tmp_path, {"lm_head.weight": None})
    with pytest.raises(ModelError, match=r"missing 1 tensors: lm_head.weight"):
        load_model(tmp_path, tie_word_embeddings=False)


def test_a_wrong_shape_names_the_tensor_and_both_shapes(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    with pytest.raises(ModelError, match=r"mlp.down_proj.weight in .*safetensors has shape \[48, 72\].*\[48, 73\]"):
        change_weights(tmp_path, {"model.layers.0.mlp.gate_proj.weight": torch.zeros(73, 48)})
        change_weights(tmp_path, {"model.layers.0.mlp.up_proj.weight": torch.zeros(73, 48)})
        for kind in ("gate", "up"):
            change_weights(tmp_path, {f"model.layers.1.mlp.{kind}_proj.weight": torch.zeros(73, 48)})
        load_model(tmp_path, intermediate_size=73)


@pytest.mark.parametrize("kept", [0, 5, 900, -10])
def test_a_truncated_file_is_named_with_the_remedy(kept: int, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model.safetensors is damaged or incomplete .*download it again"):
        load_model(tmp_path)


def test_a_folder_without_weights_says_what_to_do(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"holds no \*.safetensors weights.*load_format='dummy'"):
        load_model(tmp_path)


def test_a_file_the_index_lists_and_the_folder_lacks_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", max_shard_size="30KB")
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(ModelError, match=f"lacks 1 files: {file.name}, which model.safetensors.index.json lists"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_broken_index_is_named(text: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="is not a safetensors index"):
        load_model(tmp_path)


def test_weights_go_straight_into_the_fused_parameters(tmp_path: Path) -> None:
    """No full second copy: every slot is a view into its parameter."""
    make_checkpoint(tmp_path, "qwen2")
    config = json.loads((tmp_path / "config.json").read_text())
    model = empty_model(config)
    slots = model.slots()
    for kind, rows in (("q", slice(0, 60)), ("k", slice(60, 80)), ("v", slice(80, 100))):
        slot = slots[f"model.layers.0.self_attn.{kind}_proj.weight"]
        assert slot.target.data_ptr() == model.layers[0].attention.qkv.weight[rows].data_ptr()
    assert set(slots) == set(load_file(tmp_path / "model.safetensors"))


PEAK_OF_LOADING = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
import torch
from nanovllm.ops import operator_table
from paged import load_model
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
ops = operator_table("cpu", None, sys.argv[2] or None)
before = peak()
model = load_model(Path(sys.argv[1]), dtype=torch.bfloat16, ops=ops)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.skipif(not supported_instruction_sets(), reason="the C++ kernels are not built")
@pytest.mark.parametrize(
    ("quantization", "stored", "most"),
    [("", torch.bfloat16, 1.2), ("", torch.float32, 1.6), ("int8", torch.bfloat16, 1.0)],
)
def test_there_are_never_two_copies_of_the_weights(
    quantization: str, stored: torch.dtype, most: float, tmp_path: Path
) -> None:
    """The peak beyond what the process takes anyway, relative to the weights in bfloat16.

    Stored in float32, the head alone is half as large as they are.
    """
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {name: torch.zeros(slot.shape, dtype=stored) for name, slot in empty_model(config).slots().items()}
    save_file(weights, tmp_path / "model.safetensors")
    size = 2 * sum(weight.numel() for weight in weights.values())
    assert size > 120 * 2**20
    tests = Path(__file__).parent
    command = [sys.executable, "-c", PEAK_OF_LOADING, str(tmp_path), quantization, str(tests.parent), str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    taken = int(done.stdout)
    assert 0.4 * size < taken < most * size


def test_a_dtype_that_torch_lacks_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F17"', 1))
    with pytest.raises(ModelError, match=r"is stored as F17; weights can be F64, F32"):
        load_model(tmp_path)


def test_a_tensor_of_no_elements_and_one_of_none_are_read(tmp_path: Path) -> None:
    weights = {"none": torch.zeros(0, 3), "one": torch.tensor(2.5), "many": torch.arange(10.0)}
    save_file(weights, tmp_path / "some.safetensors")
    with TensorFile(tmp_path / "some.safetensors") as file:
        assert {name: file.dtype(name) for name in weights} == dict.fromkeys(weights, torch.float32)
        for name, weight in weights.items():
            target = torch.empty(file.tensors[name].shape)
            file.read(name, 0, target)
            assert torch.equal(target, weight)
        target = torch.empty(2, 2)
        file.read("many", 3, target)
        assert target.tolist() == [[3.0, 4.0], [5.0, 6.0]]


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = make_checkpoint(tmp_path, "qwen2")
    monkeypatch.setattr(loader, "_PIECE_BYTES", 256)
    assert (logits_of(tmp_path) - reference_logits(reference, PROMPT)).abs().max() < 2e-5


# ---- dummy weights ------------------------------------------------------------------------------------------------


def empty_model(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    return build_model(
        config,
        config["architectures"][0],
        dtype=dtype,
        device="cpu",
        ops=torch_operators(),
        parallel=ParallelContext(),
        max_model_len=64,
    )


def dummy_logits(config: dict[str, Any], seed: int) -> Tensor:
    model = empty_model(config)
    loader.load_weights(model, Path("nowhere"), "dummy", seed)
    return run_paged(model, [PROMPT], chunk=64, max_tokens=1)[1][0]


DUMMY = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def test_dummy_weights_follow_the_seed_and_nothing_else() -> None:
    first = dummy_logits(DUMMY, 1)
    torch.manual_seed(99)
    assert torch.equal(dummy_logits(DUMMY, 1), first)
    assert not torch.equal(dummy_logits(DUMMY, 2), first)
    assert first.isfinite().all() and first[-1].unique().numel() == 300  # no two rows of the head alike


def test_dummy_weights_are_as_random_as_they_should_be() -> None:
    """A matrix larger than the pool they are cut from: deviation 0.02, and no row twice."""
    model = empty_model({**DUMMY, "vocab_size": 40_000})
    loader.load_weights(model, Path("nowhere"), "dummy", 0)
    weight = model.embedding.shard.weight
    assert weight.numel() > 2 * loader._DUMMY_POOL
    assert abs(weight.std().item() - 0.02) < 1e-4 and abs(weight.mean().item()) < 1e-4
    assert torch.unique(weight[:, :4], dim=0).shape[0] == 40_000
    assert torch.equal(model.norm.weight, torch.ones(64))
