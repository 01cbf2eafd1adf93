"""transformers, in bfloat16. It pads a batch and runs it to its longest output; only what was asked for counts."""

from __future__ import annotations

from typing import Any

from workloads import Workload

from peers import Generate, measure


def load(model: str, number_format: str) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)

    def generate(work: Workload) -> None:
        width = max(map(len, work.prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in work.prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in work.prompts])
        longest = max(work.output_lens)
        sampling: dict[str, Any] = {"do_sample": False}
        if work.temperature > 0:
            sampling = {"do_sample": True, "temperature": work.temperature, "top_k": 0, "top_p": 1.0}
        output = network.generate(ids, attention_mask=mask, max_new_tokens=longest, min_new_tokens=longest,
                                  eos_token_id=None, pad_token_id=0, **sampling)  # fmt: skip
        assert output.shape[1] == width + longest

    return generate


if __name__ == "__main__":
    measure(load)
