"""What the parts of gpu_check.py and npu_check.py share: the device, the model's shape, engines, and clocks."""

from __future__ import annotations

import contextlib
import gc
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.errors import ParameterError
from nanovllm.ops import operator_table
from nanovllm.platforms import get_platform


@dataclass
class Setup:
    """How to run.

    Attributes:
        device: "cuda", "npu" or "cpu".
        quick: do as little as shows that the code works.
        shape: config.json of the model, in the folder ``model``.
        nano_vllm: a checkout of Nano-vLLM.
        limits: bytes per second of copying, operations per second of products, once measured.
    """

    device: str
    quick: bool
    shape: dict[str, Any]
    model: Path
    nano_vllm: Path | None
    attention_backend: str | None
    limits: dict[str, float] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def on_accelerator(self) -> bool:
        return self.device != "cpu"

    @property
    def dtype(self) -> torch.dtype:
        if not self.on_accelerator:
            return torch.float32
        name: str = get_platform(self.device).resolve_dtype("auto", "bfloat16")
        return getattr(torch, name)

    def device_name(self) -> str:
        """What the machine calls the device."""
        return getattr(torch, self.device).get_device_name(0) if self.on_accelerator else platform.machine() + " cpu"

    def few(self, count: int, instead: int) -> int:
        """``count``, or ``instead`` when quick."""
        return instead if self.quick else count

    def engine(self, model: Path | None = None, **options: Any) -> LLM:
        """An engine on the device, of random weights unless ``model`` is a checkpoint."""
        settings: dict[str, Any] = {"skip_tokenizer_init": True, "device": self.device, "max_model_len": 4096}
        if self.attention_backend is not None:
            settings["attention_backend"] = self.attention_backend
        if model is None:
            settings |= {"load_format": "dummy", "max_num_batched_tokens": self.few(16_384, 512)}
        if self.quick:
            settings |= {"num_gpu_blocks_override": 400, "max_model_len": 256}
        return LLM(str(model or self.model), **{**settings, **options})

    def attention_backends(self) -> list[str | None]:
        """The one that was asked for, or all that are installed; None is the device's own."""
        if self.attention_backend is not None or not self.on_gpu:
            return [self.attention_backend]
        from nanovllm.ops.cuda import ATTENTION_BACKENDS
        from nanovllm.ops.cuda.flashinfer import is_ready

        found: list[str | None] = []
        for name in ATTENTION_BACKENDS:
            if name == "flashinfer" and not is_ready():  # it would compile for minutes
                continue
            with contextlib.suppress(ParameterError):
                operator_table(self.device, name)
                found.append(name)
        return found

    def synchronize(self) -> None:
        if self.on_accelerator:
            getattr(torch, self.device).synchronize()

    def seconds(self, work: Callable[[], Any], repeats: int) -> float:
        """Seconds that ``work`` takes on the device, once it is warm: the median of ``repeats``."""
        for _ in range(3):
            work()
        times = []
        for _ in range(repeats):
            self.synchronize()
            started = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - started)
        return sorted(times)[len(times) // 2]


def generate(llm: LLM, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[list[int]]:
    """The output tokens of every prompt."""
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def fixed(max_tokens: int, temperature: float = 0.0, **options: Any) -> SamplingParams:
    """Parameters of a request that generates exactly ``max_tokens`` and needs no text."""
    return SamplingParams(
        temperature=temperature, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **options
    )  # fmt: skip


def free_memory() -> None:
    """Give back what closed engines held."""
    gc.collect()
    for name in ("cuda", "npu"):
        device = getattr(torch, name, None)
        if device is not None and device.is_available():
            device.empty_cache()
