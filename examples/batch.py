"""Many prompts at once: they share steps, so all of them take little longer than one."""

import time

from nanovllm import LLM, SamplingParams

questions = [
    "What is a KV cache?",
    "What is continuous batching?",
    "What is a block table?",
    "What does top-p do?",
    "How do you say thank you in German?",
    "What is 7 plus 5?",
]

with LLM("demo") as llm:
    conversations = [[{"role": "user", "content": question}] for question in questions]
    start = time.perf_counter()
    outputs = llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=64))
    seconds = time.perf_counter() - start

    for question, output in zip(questions, outputs, strict=True):
        print(f"{question}\n  {output.text}")
    tokens = sum(len(output.token_ids) for output in outputs)
    print(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} per second")
