"""Operators: the contract (operators.py), its definition (reference.py), and what each device does better."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nanovllm.errors import ParameterError
from nanovllm.ops.metadata import AttentionMetadata
from nanovllm.ops.operators import Operators

__all__ = ["AttentionMetadata", "Operators", "operator_table", "torch_operators"]

ATTENTION_BACKENDS = ("torch_native", "reference")


def torch_operators(attention_backend: str = "torch_native") -> Operators:
    """The operators in torch alone, for one engine on any device. ``attention_backend``: "torch_native" or "reference"
    (one row at a time, to read and to compare with)."""
    from nanovllm.ops import reference
    from nanovllm.ops.torch_native import TorchNativeAttention

    attention: Any = reference if attention_backend == "reference" else TorchNativeAttention()
    return Operators(
        rms_norm=reference.rms_norm,
        add_rms_norm=reference.add_rms_norm,
        rotary=reference.rotary,
        silu_and_mul=reference.silu_and_mul,
        gelu_and_mul=reference.gelu_and_mul,
        pack_linear=reference.pack_linear,
        linear=reference.linear,
        weight_rows=reference.weight_rows,
        write_kv=reference.write_kv,
        copy_blocks=reference.copy_blocks,
        prepare_attention=attention.prepare_attention,
        paged_attention=attention.paged_attention,
    )


def operator_table(device: str, attention_backend: str | None = None, quantization: str | None = None) -> Operators:
    """The operators of ``device`` ("cpu"), for one engine: torch's, but for those the device does better.

    ``attention_backend`` chooses attention: None takes the device's own, "torch_native" and "reference" torch's.
    ``quantization`` ("int8", "int4" or "w8a8") is what ``pack_linear`` does to a weight. Raises ParameterError for what
    does not exist.
    """
    from nanovllm.ops import cpu

    if device != "cpu":
        raise ParameterError("no operators for this device; choose 'cpu'", "device", device)
    if attention_backend is None:
        return cpu.operators(torch_operators(), quantization)
    if attention_backend not in ATTENTION_BACKENDS:
        raise ParameterError(f"choose one of {', '.join(ATTENTION_BACKENDS)}", "attention_backend", attention_backend)
    torchs = torch_operators(attention_backend)
    return replace(
        cpu.operators(torchs, quantization),
        prepare_attention=torchs.prepare_attention,
        paged_attention=torchs.paged_attention,
    )
