"""Vectors of texts: what a request asks for, and what its model is made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanovllm.errors import ModelError, ParameterError
from nanovllm.model_files import read_json

METHODS = ("last", "mean")


@dataclass
class PoolingParams:
    """How one text's vector is handed out.

    Attributes:
        dimensions: keep the first so many numbers (for models trained for it: Kusupati et al. 2022, Matryoshka
            representation learning); None keeps all.
        use_activation: scale the vector to length 1; None does what the model is made for.

    Raises:
        ParameterError: a value of the wrong type or below 1.
    """

    dimensions: int | None = None
    use_activation: bool | None = None

    def __post_init__(self) -> None:
        size = self.dimensions
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ParameterError("dimensions must be an integer of at least 1", "dimensions", size)
        if self.use_activation not in (None, True, False):
            raise ParameterError("use_activation must be a boolean", "use_activation", self.use_activation)


@dataclass(frozen=True)
class PoolingConfig:
    """What a model's vectors are by default.

    Attributes:
        only: the model makes vectors and does not generate.
        method: "last" takes the hidden state of the last token, "mean" the mean over all.
        normalize: scale vectors to length 1.
        dimensions: keep the first so many numbers; None keeps all.
        sizes: what ``dimensions`` may be, if the model says; None: anything up to its hidden size.
    """

    only: bool = False
    method: str = "last"
    normalize: bool = True
    dimensions: int | None = None
    sizes: tuple[int, ...] | None = None


def read_pooling(path: Path, hf_config: Mapping[str, Any], architecture: str) -> PoolingConfig:
    """What a checkpoint says of itself: in config.json, and in the files of sentence-transformers, if it has them.

    Raises:
        ModelError: it pools in a way that is not supported, or its files are malformed.
    """
    sizes = hf_config.get("matryoshka_dimensions")
    config = PoolingConfig(only=architecture.endswith("Model"), sizes=tuple(sizes) if sizes else None)
    file = path / "modules.json"
    if not file.is_file():
        return config
    kinds = {}
    for module in read_json(file, list):
        kinds[str(module.get("type", "")).rsplit(".", 1)[-1]] = str(module.get("path", ""))
    unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise ModelError(f"{file}: modules of type {', '.join(sorted(unknown))} are not supported")
    config = replace(config, only=True, normalize="Normalize" in kinds)
    if "Pooling" not in kinds:
        return config
    modes = read_json(path / kinds["Pooling"] / "config.json")
    mode = modes.get("pooling_mode")
    chosen = [name.removeprefix("pooling_mode_") for name, on in modes.items() if on is True and "mode_" in name]
    methods = {"lasttoken": "last", "last": "last", "mean_tokens": "mean", "mean": "mean"}
    names = [mode] if isinstance(mode, str) else chosen
    if len(names) != 1 or names[0] not in methods:
        raise ModelError(f"{path}: pooling by {', '.join(names) or 'nothing'} is not supported; last token or mean is")
    return replace(config, method=methods[names[0]])


def override_pooling(
    config: PoolingConfig, runner: str, convert: str, pooler_config: Mapping[str, Any]
) -> PoolingConfig:
    """The user's ``runner``, ``convert`` and ``pooler_config`` over what the checkpoint says.

    Raises:
        ParameterError: a value that is not supported.
    """
    if runner not in ("auto", "generate", "pooling"):
        raise ParameterError("runner must be 'auto', 'generate' or 'pooling'", "runner", runner)
    if convert not in ("auto", "none", "embed"):
        raise ParameterError("convert must be 'auto', 'none' or 'embed' in this version", "convert", convert)
    if runner != "auto":
        config = replace(config, only=runner == "pooling")
    for name, value in pooler_config.items():
        full = f"pooler_config.{name}"
        if value is None:
            continue
        if name in ("pooling_type", "seq_pooling_type"):
            if str(value).lower() not in METHODS:
                raise ParameterError("must be 'LAST' or 'MEAN' in this version", full, value)
            config = replace(config, method=str(value).lower())
        elif name in ("normalize", "use_activation") and isinstance(value, bool):
            config = replace(config, normalize=value)
        elif name == "dimensions":
            config = replace(config, dimensions=PoolingParams(dimensions=value).dimensions)
        else:
            raise ParameterError("not an option of this version, or of the wrong type", full, value)
    return config
