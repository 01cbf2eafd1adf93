"""A conversation in the terminal: the model sees all that was said, and its answer appears as it is generated."""

import itertools

from nanovllm import LLM, RequestOutputKind

messages: list[dict[str, str]] = []

with LLM("demo") as llm:
    engine = llm.llm_engine  # one level below: requests are added, then every step hands out what is new
    params = llm.get_default_sampling_params()
    params.output_kind = RequestOutputKind.DELTA
    print("An empty line ends the conversation.")
    for turn in itertools.count():
        try:
            question = input("> ")
        except EOFError:
            break
        if not question.strip():
            break
        messages.append({"role": "user", "content": question})
        engine.add_request(str(turn), engine.input.render_chat(messages), params)
        answer = ""
        while engine.has_unfinished_requests():
            for output in engine.step():
                print(output.text, end="", flush=True)
                answer += output.text
        print()
        messages.append({"role": "assistant", "content": answer})
