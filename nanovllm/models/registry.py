"""Architecture name -> the module that declares it, imported when it is first used."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from nanovllm.errors import ModelError
from nanovllm.models.decoder import DecoderSpec

ARCHITECTURES = {
    "LlamaForCausalLM": "nanovllm.models.llama",
    "MistralForCausalLM": "nanovllm.models.mistral",
    "Qwen2ForCausalLM": "nanovllm.models.qwen2",
    "Qwen3ForCausalLM": "nanovllm.models.qwen3",
}


def declaration(architecture: str) -> Callable[[dict[str, Any]], DecoderSpec]:
    """The function that turns a config.json of ``architecture`` into a `DecoderSpec`.

    Raises ModelError, which lists what is supported, for an architecture we do not know.
    """
    if architecture.endswith("Model"):  # the decoder alone, as embedding checkpoints are saved
        architecture = architecture.removesuffix("Model") + "ForCausalLM"
    if architecture not in ARCHITECTURES:
        raise ModelError(f"architecture {architecture!r} is not supported; known: {', '.join(sorted(ARCHITECTURES))}")
    return import_module(ARCHITECTURES[architecture]).declare
