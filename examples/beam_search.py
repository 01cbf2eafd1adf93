"""The likeliest completions of a prompt, best first."""

from nanovllm import LLM, BeamSearchParams

with LLM("demo") as llm:
    (result,) = llm.beam_search("The KV cache", BeamSearchParams(beam_width=4, max_tokens=12))
    for sequence in result.sequences:
        print(f"{sequence.cum_logprob:8.3f}  {sequence.text!r}")
