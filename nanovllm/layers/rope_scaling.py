"""RoPE frequencies from a model's configuration: how far each pair of dimensions turns per position.

A paged cache stores keys already rotated, so a key must never need another rotation later: the frequencies are chosen
once, from the configuration and ``max_model_len``, and hold for every sequence. Two kinds are defined in transformers
by the length of the running sequence. Ours are:

- dynamic (NTK): the base that transformers would use for a sequence of ``max_model_len`` tokens. Up to the trained
  length that is plain RoPE, in both. Beyond it transformers changes the base while a sequence grows (and leaves the
  cached keys as they were); ours keeps one base, the one of the longest sequence allowed.
- longrope: the long factors if ``max_model_len`` exceeds the original length, else the short ones. transformers decides
  by the sequence at hand, and so differs from us for short sequences in an engine that allows long ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanovllm.errors import ModelError


@dataclass(frozen=True)
class RopeConfig:
    """A model's RoPE, read from either generation of configuration files."""

    kind: str
    head_dim: int
    theta: float
    max_position_embeddings: int
    parameters: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_hf(cls, config: dict[str, Any], head_dim: int, default_max_position: int) -> RopeConfig:
        """Read ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (transformers 4)."""
        parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        if any(isinstance(value, dict) for value in parameters.values()):
            raise ModelError(f"rope_parameters per layer type are not supported for this architecture: {parameters}")
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        kind = "longrope" if kind == "su" else kind  # its first name, in early Phi-3 checkpoints
        if kind not in FREQUENCIES:
            raise ModelError(f"RoPE type {kind!r} is not supported; known: {', '.join(sorted(FREQUENCIES))}")
        partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise ModelError(f"partial_rotary_factor {partial} is not supported for this architecture")
        if head_dim % 2:
            raise ModelError(f"RoPE needs an even head_dim, this model has {head_dim}")
        theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
        max_position = config.get("max_position_embeddings") or default_max_position
        if config.get("original_max_position_embeddings"):  # beside, not in, the parameters: it wins
            parameters["original_max_position_embeddings"] = config["original_max_position_embeddings"]
        return cls(kind, head_dim, float(theta), max_position, parameters)

    def number(self, name: str) -> float:
        """A required parameter; ModelError if the checkpoint lacks it."""
        value = self.parameters.get(name)
        if value is None:
            raise ModelError(f"RoPE type {self.kind!r} needs {name!r}, which the checkpoint's configuration lacks")
        return value

    @property
    def original_length(self) -> int:
        """The context length before it was extended."""
        return self.parameters.get("original_max_position_embeddings") or self.max_position_embeddings

    @property
    def factor_or_ratio(self) -> float:
        """How far the context was extended."""
        factor = self.parameters.get("factor")
        return self.max_position_embeddings / self.original_length if factor is None else factor


def rope_frequencies(rope: RopeConfig, max_model_len: int) -> tuple[Tensor, float]:
    """Radians per position of each pair of dimensions, float32 [head_dim / 2], and the factor on cos and sin."""
    return FREQUENCIES[rope.kind](rope, max_model_len)


def _plain(theta: float, head_dim: int, slower: Tensor | float = 1.0) -> Tensor:
    """theta^(-2i / head_dim) (Su et al. 2021), ``slower`` times as slow.

    At position 32,768 the last bit of a frequency near 1 is worth 0.002 radians: the order of operations matters.
    """
    return 1.0 / (slower * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))


def _default(rope: RopeConfig, max_model_len: int) -> tuple[Tensor, float]:
    return _plain(rope.theta, rope.head_dim), 1.0


def _linear(rope: RopeConfig, max_model_len: int) -> tuple[Tensor, float]:
    """Position interpolation (Chen et al. 2023): all positions closer together."""
    return _plain(rope.theta, rope.head_dim) / rope.number("factor"), 1.0


def _dynamic(rope: RopeConfig, max_model_len: int) -> tuple[Tensor, float]:
    """NTK-aware scaling of the base, for ``max_model_len`` (see the module's text)."""
    factor, trained, dim = rope.number("factor"), rope.max_position_embeddings, rope.head_dim
    stretch = factor * max(max_model_len, trained) / trained - (factor - 1)
    return _plain(rope.theta * stretch ** (dim / (dim - 2)), dim), 1.0


def _llama3(rope: RopeConfig, max_model_len: int) -> tuple[Tensor, float]:
    """Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, those between blended."""
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    frequencies = _plain(rope.theta, rope.head_dim)
    stretched = frequencies / rope.number("factor")
    turns = rope.original_length * frequencies / (2 * math.pi)  # full turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * stretched + keep * frequencies, 1.0


def _yarn(rope: RopeConfig, max_model_len: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): dimensions that turn often keep their speed, slow ones are interpolated."""
    dim, factor = rope.head_dim, rope.factor_or_ratio

    def dimension_of(turns: float) -> float:
        """The (fractional) pair of dimensions that turns this often within the original context."""
        return dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first = dimension_of(rope.parameters.get("beta_fast") or 32)
    last = dimension_of(rope.parameters.get("beta_slow") or 1)
    if rope.parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first if last != first else 0.001
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    frequencies = _plain(rope.theta, dim, factor) * interpolated + _plain(rope.theta, dim) * (1 - interpolated)
    return frequencies, _yarn_attention(rope, factor)


def _yarn_attention(rope: RopeConfig, factor: float) -> float:
    """The temperature of YaRN, section 3.4: given, or 0.1 ln(factor) + 1."""
    given = rope.parameters.get("attention_factor")
    if given is not None:
        return given

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    above, below = rope.parameters.get("mscale"), rope.parameters.get("mscale_all_dim")
    return magnitude(above) / magnitude(below) if above and below else magnitude(1.0)


def _longrope(rope: RopeConfig, max_model_len: int) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al. 2024): one searched factor per pair of dimensions (see the module's text)."""
    name = "long_factor" if max_model_len > rope.original_length else "short_factor"
    factors = torch.tensor(rope.number(name), dtype=torch.float32)
    if factors.shape != (rope.head_dim // 2,):
        raise ModelError(f"RoPE {name} has {factors.numel()} entries, head_dim {rope.head_dim} needs half as many")
    attention = rope.parameters.get("attention_factor")
    if attention is None:
        extension = rope.factor_or_ratio
        attention = math.sqrt(1 + math.log(extension) / math.log(rope.original_length)) if extension > 1 else 1.0
    return _plain(rope.theta, rope.head_dim, factors), attention


FREQUENCIES: dict[str, Callable[[RopeConfig, int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
