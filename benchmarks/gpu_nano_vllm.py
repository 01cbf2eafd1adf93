"""Nano-vLLM's benchmark on Nano-vLLM, in a process of its own: python gpu_nano_vllm.py CHECKOUT MODEL-FOLDER.

Runs the code of the checkout as it is. What it imports beside torch and may not be there is provided: flash-attn's
two functions on torch's own flash attention (``torch.nn.attention.varlen``), and a tokenizer that only knows an end.
Weights are random, as ours are. Prints one JSON object with the seconds of the better of two runs.
"""

from __future__ import annotations

import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHECKOUT, MODEL = Path(sys.argv[1]), Path(sys.argv[2])


def provide_flash_attention() -> None:
    """A module ``flash_attn`` with what Nano-vLLM calls, unless there is a real one."""
    try:
        import flash_attn  # noqa: F401

        return
    except ImportError:
        pass
    from torch.nn.attention.varlen import varlen_attn

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, *, max_seqlen_q: int, cu_seqlens_q: Tensor, max_seqlen_k: int,
        cu_seqlens_k: Tensor, softmax_scale: float, causal: bool, block_table: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        paged = {} if block_table is None else {"seqused_k": cu_seqlens_k.diff(), "block_table": block_table}
        return varlen_attn(
            q, k, v, cu_seqlens_q, None if paged else cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            scale=softmax_scale, window_size=(-1, 0), enable_gqa=True, **paged,
        )  # fmt: skip

    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, block_table: Tensor,
        softmax_scale: float, causal: bool,
    ) -> Tensor:  # fmt: skip
        starts = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
        longest = block_table.shape[1] * k_cache.shape[1]
        out = varlen_attn(
            q[:, 0], k_cache, v_cache, starts, None, 1, longest,
            scale=softmax_scale, window_size=(-1, 0), enable_gqa=True, seqused_k=cache_seqlens, block_table=block_table,
        )  # fmt: skip
        return out[:, None]

    module: Any = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func, module.flash_attn_with_kvcache = flash_attn_varlen_func, flash_attn_with_kvcache
    sys.modules["flash_attn"] = module


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from gpu_speed import nano_requests

    for name in [name for name in sys.modules if name.split(".")[0] == "nanovllm"]:
        del sys.modules[name]  # ours: theirs has the same name
    sys.path.insert(0, str(CHECKOUT))
    provide_flash_attention()
    import transformers

    from nanovllm import LLM, SamplingParams
    from nanovllm.engine import model_runner

    if not Path(model_runner.__file__).is_relative_to(CHECKOUT.resolve()):
        raise SystemExit(f"this is not Nano-vLLM: {model_runner.__file__}")
    transformers.AutoTokenizer.from_pretrained = lambda *_, **__: types.SimpleNamespace(
        eos_token_id=2, decode=lambda ids: ""
    )
    model_runner.load_model = lambda model, path: [
        parameter.data.normal_(0.0, 0.02) for parameter in model.parameters() if parameter.dim() > 1
    ]
    llm = LLM(str(MODEL), enforce_eager=False, max_model_len=4096)
    prompts, output_lens = nano_requests(256, 1024)
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n) for n in output_lens]
    times = []
    for _ in range(2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        times.append(time.perf_counter() - started)
    print(json.dumps({"seconds": min(times), "output_tokens_per_s": sum(output_lens) / min(times)}))


if __name__ == "__main__":
    main()
