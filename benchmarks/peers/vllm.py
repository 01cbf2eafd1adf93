"""vLLM for CPUs, in bfloat16; FORMAT is "compiled" or "eager"."""

from __future__ import annotations

import os

from workloads import Workload

from peers import Generate, measure


def load(model: str, number_format: str) -> Generate:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GB
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    llm = LLM(model, max_model_len=2048, dtype="bfloat16", max_num_seqs=64, enable_prefix_caching=False,
              enforce_eager=number_format == "eager", skip_tokenizer_init=True)  # fmt: skip

    def generate(work: Workload) -> None:
        params = [
            SamplingParams(temperature=work.temperature, max_tokens=n, ignore_eos=True, detokenize=False)
            for n in work.output_lens
        ]
        outputs = llm.generate([{"prompt_token_ids": p} for p in work.prompts], params, use_tqdm=False)
        assert [len(output.outputs[0].token_ids) for output in outputs] == work.output_lens

    return generate


if __name__ == "__main__":
    measure(load)
