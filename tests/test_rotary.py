"""RoPE tables against transformers' own modules, at the positions where they go wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import ROPES
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nanovllm.layers.rope_scaling import RopeConfig
from nanovllm.layers.rotary import RotaryTable
from nanovllm.layers.weights import LayerContext
from nanovllm.ops import torch_operators
from nanovllm.parallel import ParallelContext

POSITIONS = [0, 1, 17, 1000, 1024, 8191, 8192, 32767, 32768]
LENGTH = 32769

# As published with the models that use them.
KINDS: dict[str, tuple[int, dict[str, Any]]] = {  # name -> (max_position_embeddings, rope_parameters)
    "default (Qwen3)": (40960, {"rope_type": "default", "rope_theta": 1e6}),
    "linear": (4096, {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}),
    "dynamic within the trained length": (40960, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
    "dynamic beyond it": (4096, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
    "llama3 (Llama 3.2)": (
        131072,
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn (Qwen2.5)": (
        32768,
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "yarn with attention_factor": (
        131072,
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 16.0,
            "original_max_position_embeddings": 4096,
            "attention_factor": 1.7,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
        },
    ),
    "yarn with mscale, not truncated": (
        131072,
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 0.6,
            "truncate": False,
        },
    ),
    "longrope, long": (
        131072,
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 4096,
            "short_factor": [1 + i / 50 for i in range(64)],
            "long_factor": [1 + i * 0.9 for i in range(64)],
        },
    ),
    "longrope with attention_factor": (
        131072,
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 65536,
            "attention_factor": 1.3,
            "factor": 2.0,
            "short_factor": [1 + i / 50 for i in range(64)],
            "long_factor": [1 + i * 0.9 for i in range(64)],
        },
    ),
}


def table_of(rope: RopeConfig, length: int, dtype: torch.dtype = torch.float32) -> RotaryTable:
    return RotaryTable(rope, length, LayerContext(dtype, "cpu", torch_operators(), ParallelContext()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_equals_transformers_up_to_position_32k(kind: str) -> None:
    max_position, parameters = KINDS[kind]
    shape = {"hidden_size": 512, "num_attention_heads": 4, "max_position_embeddings": max_position}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**shape, rope_parameters=dict(parameters)))
    positions = torch.tensor(POSITIONS)
    cos, sin = theirs(torch.zeros(1), positions[None])
    rope = RopeConfig.from_hf({**shape, "rope_parameters": parameters}, 128, 2048)
    ours_cos, ours_sin = table_of(rope, LENGTH).rows(positions)
    # One bit of difference in a frequency near 1 would be 0.002 at position 32,768.
    assert (ours_cos[:, 0] - cos[0]).abs().max() < 1e-5
    assert (ours_sin[:, 0, 64:] - sin[0, :, 64:]).abs().max() < 1e-5
    assert torch.equal(ours_sin[:, 0, :64], -ours_sin[:, 0, 64:])


@pytest.mark.parametrize("kind", ROPES)
def test_both_generations_of_configuration_give_the_same_table(kind: str) -> None:
    old = dict(ROPES[kind])
    theta = old.pop("rope_theta")
    new_style = {"max_position_embeddings": 256, "rope_parameters": ROPES[kind]}
    scaling = None if kind == "default" else old
    old_style = {"max_position_embeddings": 256, "rope_theta": theta, "rope_scaling": scaling}
    oldest = None if scaling is None else {("type" if k == "rope_type" else k): v for k, v in scaling.items()}
    expected = table_of(RopeConfig.from_hf(new_style, 10, 99), 300)
    for config in (old_style, {**old_style, "rope_scaling": oldest}):
        table = table_of(RopeConfig.from_hf(config, 10, 99), 300)
        assert torch.equal(table.cos, expected.cos) and torch.equal(table.sin, expected.sin)


def test_phi3_style_original_length_beside_the_scaling_wins() -> None:
    config = {
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    }
    rope = RopeConfig.from_hf(config, 8, 2048)
    assert (rope.kind, rope.original_length, rope.factor_or_ratio) == ("longrope", 4096, 32)


def test_the_table_is_rounded_once_from_float32() -> None:
    rope = RopeConfig.from_hf({}, 8, 2048)
    exact, table = table_of(rope, 16), table_of(rope, 16, torch.bfloat16)
    assert torch.equal(table.cos, exact.cos.bfloat16()) and torch.equal(table.sin, exact.sin.bfloat16())
    cos, sin = table.rows(torch.tensor([3, 3, 15]))
    assert (cos.dtype, cos.shape, sin.shape) == (torch.bfloat16, (3, 1, 8), (3, 1, 8))
    assert torch.equal(cos[0], cos[1])


def test_without_rope_settings_theta_is_ten_thousand() -> None:
    assert RopeConfig.from_hf({}, 8, 2048).theta == 10000.0
