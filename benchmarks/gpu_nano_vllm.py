"""Nano-vLLM's benchmark on Nano-vLLM, in a process of its own: python gpu_nano_vllm.py CHECKOUT MODEL-FOLDER.

Runs the code of the checkout as it is. What it imports beside torch and may not be there is provided: flash-attn's
two functions on torch's own flash attention (``torch.nn.attention.varlen``), or, where that does not read a paged
cache, decodes on our Triton kernels; and a tokenizer that only knows an end. Weights are random, as ours are. Prints
one JSON object with the seconds of the better of two runs (of the same lengths with other tokens, so that its prefix
cache finds nothing), and on which attention they ran.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PAGE = 256  # tokens of a block of Nano-vLLM's


class FlashAttention:
    """flash-attn's functions as Nano-vLLM calls them.

    Args:
        varlen: ``varlen_attn`` of the installed torch.
        paged: it reads a paged cache, by ``block_table`` and ``seqused_k``.
        decode: what decodes otherwise: (q [B, H, D], caches, lengths, block table, scale) -> [B, H, D].
    """

    def __init__(self, varlen: Callable[..., Tensor], paged: bool, decode: Callable[..., Tensor]) -> None:
        self._varlen, self._paged, self._decode = varlen, paged, decode
        options = {"enable_gqa": True}
        self._options = {name: options[name] for name in options.keys() & inspect.signature(varlen).parameters.keys()}

    @property
    def name(self) -> str:
        """Where prompts and decodes run."""
        return "torch varlen" if self._paged else "torch varlen, decodes on our Triton kernels"

    def flash_attn_varlen_func(
        self, q: Tensor, k: Tensor, v: Tensor, *, max_seqlen_q: int, cu_seqlens_q: Tensor, max_seqlen_k: int,
        cu_seqlens_k: Tensor, softmax_scale: float, causal: bool, block_table: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Prompts: keys and values of their own, or, behind cached ones, in the cache."""
        if block_table is None:
            return self._attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
        if self._paged:
            paged = {"seqused_k": cu_seqlens_k.diff(), "block_table": block_table}
            return self._attend(q, k, v, cu_seqlens_q, None, max_seqlen_q, max_seqlen_k, softmax_scale, **paged)
        lengths = cu_seqlens_k.diff()
        rows = torch.arange(len(lengths), device=q.device).repeat_interleave(lengths)
        position = torch.arange(len(rows), device=q.device) - cu_seqlens_k[rows]
        slots = block_table[rows, position // k.shape[1]].long() * k.shape[1] + position % k.shape[1]
        k, v = k.flatten(0, 1)[slots], v.flatten(0, 1)[slots]
        return self._attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)

    def flash_attn_with_kvcache(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, block_table: Tensor,
        softmax_scale: float, causal: bool,
    ) -> Tensor:  # fmt: skip
        """One query per row, q [B, 1, H, D]."""
        if not self._paged:
            return self._decode(q[:, 0], k_cache, v_cache, cache_seqlens, block_table, softmax_scale)[:, None]
        starts = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
        longest = block_table.shape[1] * k_cache.shape[1]
        paged = {"seqused_k": cache_seqlens, "block_table": block_table}
        return self._attend(q[:, 0], k_cache, v_cache, starts, None, 1, longest, softmax_scale, **paged)[:, None]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, key_starts: Tensor | None, most_q: int, most_k: int,
        scale: float, **paged: Tensor,
    ) -> Tensor:  # fmt: skip
        return self._varlen(
            q, k, v, starts, key_starts, most_q, most_k, scale=scale, window_size=(-1, 0), **self._options, **paged
        )


class TritonDecode:
    """Our decode kernel with a plan that depends on the number of rows only, so that it can be recorded."""

    def __init__(self, multiprocessors: int, shared_memory: int) -> None:
        from nanovllm.ops.cuda.attention import DecodePlan, Layer, TritonAttention

        self._attention, self._layer, self._plan = TritonAttention(multiprocessors, shared_memory), Layer, DecodePlan
        self._multiprocessors = multiprocessors
        self._items: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, block_table: Tensor, scale: float
    ) -> Tensor:
        """See `FlashAttention`."""
        rows, kv_heads = q.shape[0], k_cache.shape[2]
        if rows not in self._items:
            pieces = max(1, 2 * self._multiprocessors // (rows * kv_heads))  # of a row: all of the GPU has work
            starts = torch.arange(rows + 1, dtype=torch.int32, device=q.device) * pieces
            of_row = torch.arange(rows * pieces, dtype=torch.int32, device=q.device) // pieces
            self._items[rows] = starts, of_row
        out = torch.empty_like(q)
        layer = self._layer(
            q.contiguous(), k_cache, v_cache, out, block_table, 0, (*k_cache.stride()[:3],), scale
        )  # fmt: skip
        self._attention.decode(layer, self._plan(lengths, *self._items[rows]))
        return out


def reads_pages(varlen: Callable[..., Tensor], device: str) -> bool:
    """Whether ``varlen_attn`` reads a paged cache: its parameters say so, and it does it."""
    if not {"seqused_k", "block_table"} <= inspect.signature(varlen).parameters.keys():
        return False
    q, cache = (torch.zeros(*shape, 128, dtype=torch.bfloat16, device=device) for shape in ((1, 2), (2, _PAGE, 1)))
    table, length = (torch.ones(*shape, dtype=torch.int32, device=device) for shape in ((1, 1), (1,)))
    attention = FlashAttention(varlen, True, TritonDecode)
    try:
        options: dict[str, Any] = {"cache_seqlens": length, "block_table": table, "softmax_scale": 1.0, "causal": True}
        return bool(attention.flash_attn_with_kvcache(q[:, None], cache, cache, **options).isfinite().all())
    except (RuntimeError, ValueError):
        return False


def provide_flash_attention() -> str:
    """See to it that there is a module ``flash_attn``; returns where attention runs."""
    try:
        import flash_attn  # noqa: F401

        return "flash-attn"
    except ImportError:
        pass
    from torch.nn.attention.varlen import varlen_attn

    properties = torch.cuda.get_device_properties(0)
    shared_memory = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    decode = TritonDecode(properties.multi_processor_count, shared_memory)
    attention = FlashAttention(varlen_attn, reads_pages(varlen_attn, "cuda"), decode)
    module: Any = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = attention.flash_attn_varlen_func
    module.flash_attn_with_kvcache = attention.flash_attn_with_kvcache
    sys.modules["flash_attn"] = module
    return attention.name


def main(checkout: Path, model: Path) -> None:
    from workloads import nano_requests

    attention = provide_flash_attention()
    for name in [name for name in sys.modules if name.split(".")[0] == "nanovllm"]:
        del sys.modules[name]  # ours: theirs has the same name
    sys.path.insert(0, str(checkout))
    import transformers

    from nanovllm import LLM, SamplingParams
    from nanovllm.engine import model_runner

    if not Path(model_runner.__file__).is_relative_to(checkout.resolve()):
        raise SystemExit(f"this is not Nano-vLLM: {model_runner.__file__}")
    transformers.AutoTokenizer.from_pretrained = lambda *_, **__: types.SimpleNamespace(
        eos_token_id=2, decode=lambda ids: ""
    )
    model_runner.load_model = lambda model, path: [
        parameter.data.normal_(0.0, 0.02) for parameter in model.parameters() if parameter.dim() > 1
    ]
    llm = LLM(str(model), enforce_eager=False, max_model_len=4096)
    prompts, output_lens = nano_requests(256, 1024)
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n) for n in output_lens]
    llm.generate([[7, 8, 9]], SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=4), use_tqdm=False)
    times = []
    for number in range(2):
        others = [[(token + number) % 10_000 for token in prompt] for prompt in prompts]
        torch.cuda.synchronize()
        started = time.perf_counter()
        llm.generate(others, params, use_tqdm=False)
        times.append(time.perf_counter() - started)
    seconds = min(times)
    result = {"seconds": seconds, "output_tokens_per_s": sum(output_lens) / seconds, "attention": attention}
    print(json.dumps(result))


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(root)]  # ours, for the kernels; main replaces it
    main(Path(sys.argv[1]), Path(sys.argv[2]))
