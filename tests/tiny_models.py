"""Tiny random checkpoints that transformers can read too: the common ground of the parity tests.

The weights are drawn so that the next token depends on the whole context. Default initialisation would not do: with
small weights and a tied head a model repeats its last token whatever came before, and a broken attention goes unseen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")

# Odd on purpose: head_dim is not hidden_size / num_attention_heads, three query heads share a KV head, nothing is a
# multiple of 32 but what RoPE needs.
_SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "mistral": {"sliding_window": None},
}

# One set of parameters per RoPE kind, for max_position_embeddings 256 and head_dim 10 (five frequencies).
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4],
        "long_factor": [1.0, 1.7, 2.6, 3.1, 4.0],
    },
}


def tiny_config(family: str, rope: str | dict[str, Any] = "default", **overrides: Any) -> Any:
    """A transformers config of ``family`` (one of FAMILIES) with RoPE ``rope`` (a name in ROPES, or parameters)."""
    import transformers

    classes = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "mistral": "MistralConfig"}
    parameters = dict(ROPES[rope] if isinstance(rope, str) else rope)
    return getattr(transformers, classes[family])(
        **{**_SHAPE, **_FAMILY[family], "rope_parameters": parameters, **overrides}
    )


def tiny_model(config: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A transformers model of ``config`` with weights under which every token of the context matters."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.5, 1.5, generator=generator)
                if "q_norm" in name or "k_norm" in name:
                    weight.mul_(1.5)  # sharp attention: the scores have a deviation of about 2
            elif name.endswith(".bias"):
                weight.normal_(0.0, 0.3, generator=generator)
            elif "embed_tokens" in name:
                # Small against what the layers add, so that a tied head does not just repeat the last token.
                weight.normal_(0.0, 0.1, generator=generator)
            else:
                gain = 2.0 if "q_proj" in name or "k_proj" in name or "o_proj" in name else 1.0
                weight.normal_(0.0, gain * weight.shape[-1] ** -0.5, generator=generator)
    return model.to(dtype).eval()


def save_checkpoint(model: Any, path: Path, *, config_style: str = "v5", max_shard_size: str = "1GB") -> Path:
    """Save ``model`` to the folder ``path``; ``config_style`` "v4" writes ``rope_theta``, ``rope_scaling`` and
    ``torch_dtype`` as transformers 4 did. A small ``max_shard_size`` ("20KB") gives several files and an index."""
    model.save_pretrained(path, max_shard_size=max_shard_size)
    if config_style == "v4":
        file = Path(path) / "config.json"
        config = json.loads(file.read_text())
        parameters = config.pop("rope_parameters")
        config["rope_theta"] = parameters.pop("rope_theta")
        config["rope_scaling"] = None if parameters["rope_type"] == "default" else parameters
        config["torch_dtype"] = config.pop("dtype")
        file.write_text(json.dumps(config, indent=1))
    return Path(path)


def make_checkpoint(
    path: Path,
    family: str = "qwen3",
    rope: str | dict[str, Any] = "default",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    config_style: str = "v5",
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Any:
    """Write a tiny checkpoint (config.json, safetensors; no tokenizer) to ``path``; returns the transformers model."""
    model = tiny_model(tiny_config(family, rope, **overrides), seed, dtype)
    save_checkpoint(model, path, config_style=config_style, max_shard_size=max_shard_size)
    return model


@torch.no_grad()
def reference_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    """Logits of the transformers model at every position of one sequence: float32 [len(token_ids), vocab]."""
    return model(torch.tensor([token_ids]), use_cache=False).logits[0].float()


def reference_greedy(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy continuation by the transformers model without its cache; never stops at EOS."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(int(reference_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]
