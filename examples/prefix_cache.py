"""Prompts that begin alike compute their common beginning once."""

from nanovllm import LLM, SamplingParams

rules = "You answer questions about an inference engine. " * 40
params = SamplingParams(temperature=0.0, max_tokens=24)

with LLM("demo") as llm:
    for question in ("What is a block?", "What is a block?", "What is a slot?"):
        messages = [{"role": "system", "content": rules}, {"role": "user", "content": question}]
        (output,) = llm.chat(messages, params, use_tqdm=False)
        print(f"{question} {output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens were cached")

    llm.reset_prefix_cache()
    (output,) = llm.chat(messages, params, use_tqdm=False)
    print(f"after a reset: {output.num_cached_tokens}")
