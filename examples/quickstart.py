"""One question, one answer."""

from nanovllm import LLM

with LLM("demo") as llm:  # or a folder, or a hub id such as "Qwen/Qwen3-0.6B"
    (output,) = llm.chat([{"role": "user", "content": "What is paged attention?"}])
    print(output.text)
