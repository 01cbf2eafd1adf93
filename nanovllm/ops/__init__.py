"""Operators: the contract (operators.py), its definition (reference.py), and what each device does better."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nanovllm.errors import ParameterError
from nanovllm.ops.metadata import AttentionMetadata
from nanovllm.ops.operators import Forward, Operators

__all__ = ["AttentionMetadata", "Forward", "Operators", "operator_table", "torch_operators"]

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
        silu_and_mul=reference.silu_and_mul,
        gelu_and_mul=reference.gelu_and_mul,
        pack_linear=reference.pack_linear,
        linear=reference.linear,
        weight_rows=reference.weight_rows,
        norm_rotate_write=reference.norm_rotate_write,
        copy_blocks=reference.copy_blocks,
        prepare_attention=attention.prepare_attention,
        paged_attention=attention.paged_attention,
        record=reference.record,
        keep_likeliest=reference.keep_likeliest,
    )


def operator_table(device: str, attention_backend: str | None = None, quantization: str | None = None) -> Operators:
    """The operators of ``device`` ("cpu", "cuda" or "npu"), for one engine: torch's, and what a device does better.

    ``attention_backend`` chooses attention: None takes the device's own, "torch_native" and "reference" torch's, and a
    GPU has some of its own. ``quantization`` ("int8", "int4", "w8a8", on a GPU "fp8" too) is what ``pack_linear`` does
    to a weight. Raises ParameterError for what does not exist.
    """
    if device not in ("cpu", "cuda", "npu"):
        raise ParameterError("no operators for this device; choose 'cpu', 'cuda' or 'npu'", "device", device)
    own = _own_backends(device)
    if attention_backend not in (None, *own, *ATTENTION_BACKENDS):
        choices = ", ".join((*own, *ATTENTION_BACKENDS))
        raise ParameterError(f"on {device}, choose one of {choices}", "attention_backend", attention_backend)
    if attention_backend not in ATTENTION_BACKENDS:
        return _own_operators(device, torch_operators(), attention_backend, quantization)
    torchs = torch_operators(attention_backend)
    own_operators = _own_operators(device, torchs, None, quantization)
    if own_operators.new_cache is not None:
        raise ParameterError("only this device's own attention reads its cache", "attention_backend", attention_backend)
    return replace(
        own_operators,
        prepare_attention=torchs.prepare_attention,
        paged_attention=torchs.paged_attention,
        record=torchs.record,
        new_caches=None,
        tune=None,
    )


def _own_backends(device: str) -> tuple[str, ...]:
    from nanovllm.ops import cuda

    return cuda.ATTENTION_BACKENDS if device == "cuda" else ()


def _own_operators(device: str, base: Operators, attention_backend: str | None, quantization: str | None) -> Operators:
    if device == "cuda":
        from nanovllm.ops import cuda

        return cuda.operators(base, cuda.Hardware.of_current_device(), attention_backend, quantization)
    if device == "npu":
        from nanovllm.ops import npu

        return npu.operators(base, *npu.current_device(), quantization)
    from nanovllm.ops import cpu

    return cpu.operators(base, quantization)
