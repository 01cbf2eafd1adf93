"""Our engine; FORMAT is bf16, or a value of ``quantization``."""

from __future__ import annotations

from workloads import Workload

from peers import Generate, measure


def load(model: str, number_format: str) -> Generate:
    from nanovllm import LLM, SamplingParams

    quantization = None if number_format == "bf16" else number_format
    # Peers have no prefix cache; with ours the warm-up would do half of the work that is measured.
    llm = LLM(model, skip_tokenizer_init=True, max_model_len=2048, enable_prefix_caching=False, max_num_seqs=64,
              quantization=quantization)  # fmt: skip

    def generate(work: Workload) -> None:
        params = [SamplingParams(temperature=work.temperature, max_tokens=n, ignore_eos=True) for n in work.output_lens]
        outputs = llm.generate(work.prompts, params, use_tqdm=False)  # type: ignore[arg-type]
        assert [len(output.token_ids) for output in outputs] == work.output_lens

    return generate


if __name__ == "__main__":
    measure(load)
