"""What a model folder says of itself: the ``config.json`` of the Hugging Face format, in both of its generations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanovllm.errors import ModelError


def read_json(file: Path, kind: type = dict) -> Any:
    """What a JSON file of a model folder holds: an object, or an array with ``kind=list``.

    Raises:
        ModelError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, kind):
        raise ModelError(f"{file} must hold a JSON {'array' if kind is list else 'object'}, not {type(value).__name__}")
    return value


def read_hf_config(path: Path, overrides: dict[str, Any] | None = None) -> tuple[dict[str, Any], str]:
    """Read ``config.json``: the (text) configuration and the architecture's name.

    Raises:
        ModelError: no config.json, not JSON, or no architecture in it.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ModelError(f"{path} has no config.json: not a model folder in the Hugging Face format")
    config = {**read_json(file), **(overrides or {})}
    architectures = config.get("architectures") or []
    if not architectures:
        raise ModelError(f"{file} names no 'architectures'; add it with hf_overrides={{'architectures': [...]}}")
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            f"{path}: quantised checkpoints ({method}) are not supported by this version; use the bf16 one"
        )
    text = config.get("text_config")
    return ({**config, **text} if isinstance(text, dict) else config), architectures[0]


def checkpoint_dtype(hf_config: dict[str, Any]) -> str | None:
    """The dtype a checkpoint was saved in, by its config of either generation; None if it does not say."""
    return hf_config.get("dtype") or hf_config.get("torch_dtype")


def derived_context(hf_config: dict[str, Any]) -> int:
    """The longest context a checkpoint is made for, in tokens, RoPE scaling included."""
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if hf_config.get(key):
            length = int(hf_config[key])
            break
    else:
        return 2048
    scaling = _rope_scaling(hf_config)
    if _rope_kind(scaling) in ("linear", "dynamic", "yarn") and scaling.get("factor"):
        original = scaling.get("original_max_position_embeddings")
        return max(int((original or length) * float(scaling["factor"])), length)
    return length


def default_context(hf_config: dict[str, Any]) -> int:
    """The context taken if none is asked for, in tokens.

    That is the longest, but for dynamic RoPE the trained one: there a longer context changes every short text too.
    """
    if _rope_kind(_rope_scaling(hf_config)) == "dynamic" and hf_config.get("max_position_embeddings"):
        return int(hf_config["max_position_embeddings"])
    return derived_context(hf_config)


def positive(hf_config: dict[str, Any], key: str, path: Path) -> int:
    """A whole number above 0 out of ``config.json``.

    Raises:
        ModelError: it is missing, or something else.
    """
    value = hf_config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{path / 'config.json'}: {key} must be a positive integer, not {value!r}")
    return value


def _rope_scaling(hf_config: dict[str, Any]) -> dict[str, Any]:
    """RoPE parameters, of a configuration of either generation."""
    return hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}


def _rope_kind(scaling: dict[str, Any]) -> str:
    return str(scaling.get("rope_type") or scaling.get("type") or "default")
