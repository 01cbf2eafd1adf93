"""What a model folder says of itself: the ``config.json`` of the Hugging Face format, in both of its generations, and
which weights its files hold."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
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


# ---- weights ------------------------------------------------------------------------------------------------------

_LARGEST_HEADER = 100_000_000  # bytes; as in the library of the format


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: the format's name of its dtype, its shape, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def checkpoint_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or ``model.safetensors``, or all there are."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not a safetensors index ({error!r}); download it again") from error
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise ModelError(
                f"{path} lacks {some_of(missing, 'files')}, which {index.name} lists; complete the download"
            )
        return [path / name for name in names]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{path} holds no *.safetensors weights; convert the checkpoint to safetensors, "
            "or try the engine without weights with load_format='dummy'"
        )
    return files


def read_tensor_header(file: Path) -> dict[str, StoredTensor]:
    """What a file in the safetensors format (https://huggingface.co/docs/safetensors) holds, by name.

        8 bytes: length of the header | header: JSON, name -> dtype, shape, where its bytes are | bytes of all tensors

    Raises ModelError for a file that is damaged or incomplete.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            begin = 8 + length
            if size < 8 or begin > size or length > _LARGEST_HEADER:
                raise ValueError(f"its header should have {length} bytes")
            header = json.loads(stream.read(length))
        found = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                if not 0 <= start <= end <= size - begin:
                    raise ValueError(f"{name} should end at byte {begin + end}")
                found[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), begin + start, begin + end)
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is damaged or incomplete ({size} bytes: {error}); download it again") from error


def some_of(names: Iterable[str], what: str = "tensors", most: int = 8) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return f"{len(listed)} {what}: " + ", ".join(listed[:most]) + more
