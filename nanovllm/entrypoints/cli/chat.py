"""``nanovllm chat``: a conversation with a model in this process.

At a terminal, lines are edited and remembered, and Ctrl-C stops an answer, not the program. Through a pipe every line
is a message, answered in order. Each prompt repeats the conversation so far, which the prefix cache makes cheap.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

from nanovllm.entrypoints.cli.conversation import Conversation
from nanovllm.entrypoints.cli.flags import SAMPLING_HELP, add_engine_flags, add_field_flags, engine_args
from nanovllm.entrypoints.cli.lines import interrupts_noted, is_typed, piped_lines, say, typed_lines
from nanovllm.entrypoints.cli.loading import load_llm
from nanovllm.entrypoints.cli.parser import CommandParser, MergeJson, UsageError, suggestion
from nanovllm.entrypoints.cli.prompts import valid_text
from nanovllm.entrypoints.cli.requests import sampling_params, stream
from nanovllm.errors import ParameterError
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.entrypoints.llm import LLM

COMMANDS = {
    "/help": "list these commands",
    "/clear": "forget the conversation and begin a new one; also /new",
    "/retry": "answer the last message again",
    "/exit": "end the program; also /quit and Ctrl-D",
}
_ALIASES = {"/new": "/clear", "/quit": "/exit"}
_SAMPLING = {name: text for name, text in SAMPLING_HELP.items() if name not in ("n", "logprobs")}


def add_arguments(parser: CommandParser) -> None:
    """Options of the command."""
    parser.usage = "%(prog)s [options]"
    parser.epilog = (
        "Every line, typed or from a pipe, is a message. /help lists commands; Ctrl-C stops an answer, Ctrl-D ends. "
        'Example: nanovllm chat -q "What is paged attention?"'
    )
    parser.add_argument("--quick", "-q", metavar="MESSAGE", help="answer one message and end")
    parser.add_argument("--system-prompt", metavar="TEXT", help="a system message before the conversation")
    parser.add_argument(
        "--chat-template-kwargs",
        action=MergeJson,
        default={},
        help='variables for the chat template, such as {"enable_thinking": true}',
    )
    parser.add_argument("--stats", action="store_true", help="after each answer, print its speed to standard error")
    parser.add_argument("--verbose", "-v", action="store_true", help="show the engine's messages")
    parser.add_argument("--url", help=argparse.SUPPRESS)  # of vLLM's chat
    sampling = parser.add_argument_group(
        "sampling", "Defaults are the model's own (generation_config.json), and these where it has none."
    )
    add_field_flags(sampling, SamplingParams, _SAMPLING, {"max_tokens": "the rest of the context"})
    add_engine_flags(parser, without=("seed", "-q"))  # --seed is the request's, -q is --quick


def run(arguments: argparse.Namespace) -> int:
    """Answer messages until there are no more."""
    if arguments.url is not None:
        raise UsageError("--url: this version does not talk to servers; chat runs the model itself (--model)")
    given = {name: getattr(arguments, name) for name in _SAMPLING if hasattr(arguments, name)}
    SamplingParams(**given)  # refuses nonsense before a model is loaded
    for text, name in ((arguments.quick, "the message"), (arguments.system_prompt, "--system-prompt")):
        if text is not None:
            valid_text(text, name)
    if arguments.quick is not None and not arguments.quick.strip():
        raise UsageError("--quick: the message is empty")
    with load_llm(engine_args(arguments, without=("seed",)), arguments.verbose) as llm:
        chat = _Chat(llm, arguments, sampling_params(llm, given, None))
        if arguments.quick is not None:
            chat.reply(arguments.quick)
        elif is_typed():
            chat.run_typed()
        else:
            chat.run_piped()
    return 0


class _Chat:
    """Messages in, answers out."""

    def __init__(self, llm: LLM, arguments: argparse.Namespace, params: SamplingParams) -> None:
        model = llm.llm_engine.model_config
        tokenizer = llm.get_tokenizer()
        if tokenizer is None:
            raise ParameterError("a chat needs a tokenizer", "skip_tokenizer_init", True)
        tokenizer.get_chat_template()  # refuses a model that has none, before anybody types
        self._llm = llm
        self._params = params
        self._stats: bool = arguments.stats
        self._banner = f"{model.model}, a context of {model.max_model_len} tokens. /help lists commands, Ctrl-D ends."
        self._conversation = Conversation(
            lambda messages: llm.llm_engine.input.render_chat(
                messages, chat_template_kwargs=arguments.chat_template_kwargs
            ),
            model.max_model_len,
            params.max_tokens,
            arguments.system_prompt,
        )

    def run_typed(self) -> None:
        """Converse with somebody at a terminal: nothing but the end of input ends it."""
        say(self._banner)
        with closing(typed_lines("> ")) as lines:  # closed at once, so that the history of lines is saved
            for line in lines:
                try:
                    with interrupts_noted() as interrupted:
                        if not self._take(line, interrupted):
                            return
                except ParameterError as error:
                    say(f"nanovllm: {error}")

    def run_piped(self) -> None:
        """Answer the lines of standard input."""
        for line in piped_lines():
            if not self._take(line):
                return

    def reply(self, message: str, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Stream the answer to a message to standard output."""
        start = time.perf_counter()
        prompt, forgotten = self._conversation.ask(message)
        if forgotten:
            say(f"(the context is full: {forgotten} of the oldest turns are forgotten)")
        text, arrivals, num_cached, finish_reason = "", [], None, None
        try:
            with closing(stream(self._llm, prompt, self._params)) as outputs:
                for output in outputs:
                    piece = output.outputs[0]
                    arrivals += [time.perf_counter()] * len(piece.token_ids)
                    num_cached, finish_reason = output.num_cached_tokens, piece.finish_reason
                    text += piece.text
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()
                    if interrupted():
                        break
        finally:
            sys.stdout.write("\n")
            sys.stdout.flush()
        if text or finish_reason is not None:
            self._conversation.answer(text)
        else:
            self._conversation.take_back()
        if finish_reason is None:
            say("(stopped)")
        if self._stats and arrivals:
            say(_speed(start, arrivals, len(prompt["prompt_token_ids"]), num_cached or 0))

    def _take(self, line: str, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Do what a line asks for; False if that is to end."""
        command = _ALIASES.get(line.strip(), line.strip())
        if command == "/exit":
            return False
        if command == "/clear":
            self._conversation.clear()
            say("(a new conversation)")
        elif command == "/help":
            say("\n".join(f"{name:<8}{text}" for name, text in COMMANDS.items()))
        elif command == "/retry":
            question = self._conversation.take_back()
            if question is None:
                say("(there is nothing to answer yet)")
            else:
                self.reply(question, interrupted)
        elif command.startswith("/") and (hint := suggestion(command, [*COMMANDS, *_ALIASES])):
            say(f"(there is no command {command}{hint})")
        elif command:
            self.reply(line, interrupted)
        return True


def _speed(start: float, arrivals: list[float], num_prompt_tokens: int, num_cached_tokens: int) -> str:
    """One line about an answer, from the times its tokens arrived."""
    first, last = arrivals[0], arrivals[-1]
    rate = f"{(len(arrivals) - 1) / (last - first):.1f} tokens/s, " if last > first else ""
    return (
        f"[{rate}TTFT {first - start:.3f} s, {len(arrivals)} tokens; "
        f"prompt {num_prompt_tokens} tokens, {num_cached_tokens} from the cache]"
    )
