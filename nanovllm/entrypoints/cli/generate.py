"""``nanovllm generate``: answer one prompt, or many, in this process.

One prompt streams to standard output as it is generated. Several run as one batch, and are printed in their order.
If the model has a chat template a prompt is a user's message; ``--raw`` completes the text as it stands.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from nanovllm.entrypoints.cli.flags import SAMPLING_HELP, add_engine_flags, add_field_flags, engine_args
from nanovllm.entrypoints.cli.loading import load_llm
from nanovllm.entrypoints.cli.parser import CommandParser, MergeJson
from nanovllm.entrypoints.cli.prompts import read_prompts
from nanovllm.entrypoints.cli.requests import sampling_params, stream
from nanovllm.errors import ParameterError
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.entrypoints.llm import LLM
    from nanovllm.outputs import RequestOutput

DEFAULT_MAX_TOKENS = 256


def add_arguments(parser: CommandParser) -> None:
    """Options of the command."""
    parser.usage = "%(prog)s [PROMPT] [options]"
    parser.epilog = (
        "A prompt is an argument, or everything on standard input. --file runs many, one per line. "
        'Example: nanovllm generate "What is paged attention?" --max-tokens 64'
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the prompt; - or nothing reads standard input")
    text = "a file with one prompt per line; - reads the lines of standard input"
    parser.add_argument("--file", "-f", metavar="FILE", help=text)
    parser.add_argument("--raw", action="store_true", help="complete the text as it is, without the chat template")
    parser.add_argument("--system-prompt", metavar="TEXT", help="a system message before every prompt")
    parser.add_argument("--chat-template-kwargs", action=MergeJson, default={}, help="variables for the chat template")
    parser.add_argument("--json", action="store_true", help="one JSON object per output and line")
    parser.add_argument("--verbose", "-v", action="store_true", help="show the engine's messages")
    sampling = parser.add_argument_group(
        "sampling", "Defaults are the model's own (generation_config.json), and these where it has none."
    )
    add_field_flags(sampling, SamplingParams, SAMPLING_HELP, {"max_tokens": DEFAULT_MAX_TOKENS})
    add_engine_flags(parser, without=("seed",))  # --seed is the request's


def run(arguments: argparse.Namespace) -> int:
    """Generate and print."""
    if arguments.raw and arguments.system_prompt is not None:
        raise ParameterError("a system message needs the chat template; leave out --raw", "system_prompt",
                             arguments.system_prompt)  # fmt: skip
    given = {name: getattr(arguments, name) for name in SAMPLING_HELP if hasattr(arguments, name)}
    SamplingParams(**given)  # refuses nonsense before a model is loaded
    prompts = read_prompts(arguments.prompt, arguments.file)
    with load_llm(engine_args(arguments, without=("seed",)), arguments.verbose) as llm:
        params = sampling_params(llm, given, DEFAULT_MAX_TOKENS)
        requests = [_request(llm, arguments, prompt) for prompt in prompts]
        if len(requests) == 1 and params.n == 1 and not arguments.json:
            _stream(llm, requests[0], params)
        else:
            _batch(llm, prompts, requests, params, arguments.json)
    return 0


def _request(llm: LLM, arguments: argparse.Namespace, prompt: str) -> Any:
    """A prompt in the form the engine takes: rendered as a conversation if the model is made for that."""
    tokenizer = llm.get_tokenizer()
    if arguments.raw or tokenizer is None or not tokenizer.chat_templates:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    if arguments.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": arguments.system_prompt})
    return llm.llm_engine.input.render_chat(messages, chat_template_kwargs=arguments.chat_template_kwargs)


def _stream(llm: LLM, request: Any, params: SamplingParams) -> None:
    """Print one output as it is generated."""
    try:
        for output in stream(llm, request, params):
            sys.stdout.write(output.outputs[0].text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write("\n")  # the shell's prompt gets a line of its own
        raise
    sys.stdout.write("\n")


def _batch(llm: LLM, prompts: list[str], requests: list[Any], params: SamplingParams, as_json: bool) -> None:
    """Run all prompts together and print their outputs in order."""
    for number, request in enumerate(requests, start=1):
        try:
            llm.enqueue(request, params)
        except ParameterError as error:
            if len(requests) == 1:
                raise
            raise ParameterError(f"prompt {number} of {len(requests)}: {error}") from error
    outputs = llm.wait_for_completion(use_tqdm=sys.stderr.isatty() and len(requests) > 1)
    for prompt, output in zip(prompts, outputs, strict=True):
        if as_json:
            _print_json(prompt, output)
        else:
            _print_text(prompt, output, heading=len(prompts) > 1)


def _print_json(prompt: str, output: RequestOutput) -> None:
    for completion in output.outputs:
        line: dict[str, Any] = {
            "prompt": prompt,
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            "index": completion.index,
            "num_prompt_tokens": len(output.prompt_token_ids),
            "num_cached_tokens": output.num_cached_tokens,
        }
        if completion.logprobs is not None:
            line["cumulative_logprob"] = completion.cumulative_logprob
            line["logprobs"] = [
                [
                    {"token_id": token_id, "token": entry.decoded_token, "logprob": entry.logprob, "rank": entry.rank}
                    for token_id, entry in position.items()
                ]
                for position in completion.logprobs
            ]
        print(json.dumps(line, ensure_ascii=False))


def _print_text(prompt: str, output: RequestOutput, heading: bool) -> None:
    for completion in output.outputs:
        if heading or len(output.outputs) > 1:
            number = f" [{completion.index + 1}]" if len(output.outputs) > 1 else ""
            print(f">>> {prompt}{number}")
        print(completion.text)
        if heading or len(output.outputs) > 1:
            print()
