"""``nanovllm chat``: a conversation with a model in this process, or with a server.

At a terminal, lines are edited and remembered, and Ctrl-C stops an answer, not the program. Through a pipe every line
is a message, answered in order. Each prompt repeats the conversation so far, which the prefix cache makes cheap.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any

from nanovllm.entrypoints.cli.answering import add_answering_flags, read_answering_flags
from nanovllm.entrypoints.cli.answers import Pieces, show
from nanovllm.entrypoints.cli.conversation import Conversation, Message
from nanovllm.entrypoints.cli.lines import interrupts_noted, is_typed, piped_lines, say, typed_lines
from nanovllm.entrypoints.cli.loading import load_llm
from nanovllm.entrypoints.cli.parser import CommandParser, MergeJson, UsageError, suggestion
from nanovllm.entrypoints.cli.prompts import valid_text
from nanovllm.entrypoints.cli.remote import RemoteModel, TooLongError
from nanovllm.entrypoints.cli.requests import sampling_params, stream_pieces
from nanovllm.errors import ParameterError

if TYPE_CHECKING:
    from nanovllm.entrypoints.llm import LLM
    from nanovllm.inputs import TokensPrompt

COMMANDS = {
    "/help": "list these commands",
    "/clear": "forget the conversation and begin a new one; also /new",
    "/retry": "answer the last message again",
    "/exit": "end the program; also /quit and Ctrl-D",
}
_ALIASES = {"/new": "/clear", "/quit": "/exit"}


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
    add_answering_flags(parser, "answer", "the rest of the context")


def run(arguments: argparse.Namespace) -> int:
    """Answer messages until there are no more."""
    given, engine = read_answering_flags(arguments)
    for text, name in ((arguments.quick, "the message"), (arguments.system_prompt, "--system-prompt")):
        if text is not None:
            valid_text(text, name)
    if arguments.quick is not None and not arguments.quick.strip():
        raise UsageError("--quick: the message is empty")
    if arguments.url is not None:
        with RemoteModel(arguments.url, arguments.model_name, arguments.api_key, given) as model:
            _converse(_remote_chat(model, arguments), arguments.quick)
    else:
        with load_llm(engine, arguments.verbose) as llm:
            _converse(_local_chat(llm, arguments, given), arguments.quick)
    return 0


def _local_chat(llm: LLM, arguments: argparse.Namespace, given: dict[str, Any]) -> _Chat:
    model = llm.llm_engine.model_config
    params = sampling_params(llm, given, None)
    tokenizer = llm.get_tokenizer()
    if tokenizer is None:
        raise ParameterError("a chat needs a tokenizer", "skip_tokenizer_init", True)
    tokenizer.get_chat_template()  # refuses a model that has none, before anybody types

    def render(messages: list[Message]) -> tuple[TokensPrompt, int]:
        kwargs = arguments.chat_template_kwargs
        prompt = llm.llm_engine.input.render_chat(messages, chat_template_kwargs=kwargs)
        return prompt, len(prompt["prompt_token_ids"])

    return _Chat(
        Conversation(render, model.max_model_len, params.max_tokens, arguments.system_prompt),
        lambda prompt: stream_pieces(llm, prompt, params),
        f"{model.model}, a context of {model.max_model_len} tokens.",
        arguments.stats,
    )


def _remote_chat(model: RemoteModel, arguments: argparse.Namespace) -> _Chat:
    return _Chat(
        Conversation(lambda messages: (messages, 0), model.context or sys.maxsize, None, arguments.system_prompt),
        lambda messages: model.chat(messages, arguments.chat_template_kwargs),
        model.banner,
        arguments.stats,
        remote=True,
    )


def _converse(chat: _Chat, quick: str | None) -> None:
    if quick is not None:
        chat.reply(quick)
    elif is_typed():
        chat.run_typed()
    else:
        chat.run_piped()


class _Chat:
    """Messages in, answers out.

    Args:
        answer: makes the pieces of an answer from what the conversation renders.
        banner: says who answers.
        stats: say how fast each answer was.
        remote: a server answers, and waiting for it can be interrupted anywhere; a step of an engine cannot.
    """

    def __init__(
        self,
        conversation: Conversation[Any],
        answer: Callable[[Any], Pieces],
        banner: str,
        stats: bool,
        remote: bool = False,
    ) -> None:
        self._conversation = conversation
        self._answer = answer
        self._banner = banner
        self._stats = stats
        self._remote = remote
        self._typed = False

    def run_typed(self) -> None:
        """Converse with somebody at a terminal: nothing but the end of input ends it."""
        self._typed = True
        say(f"{self._banner} /help lists commands, Ctrl-D ends.")
        with closing(typed_lines("> ")) as lines:  # closed at once, so that the history of lines is saved
            for line in lines:
                try:
                    with nullcontext(lambda: False) if self._remote else interrupts_noted() as interrupted:
                        if not self._take(line, interrupted):
                            return
                except (ParameterError, UsageError) as error:
                    say(f"nanovllm: {error}")

    def run_piped(self) -> None:
        """Answer the lines of standard input."""
        for line in piped_lines():
            if not self._take(line):
                return

    def reply(self, message: str, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Stream the answer to a message to standard output."""
        prompt, forgotten = self._conversation.ask(message)
        answer = None
        try:
            while answer is None:
                if forgotten:
                    say(f"(the context is full: {forgotten} of the oldest turns are forgotten)")
                try:
                    answer = show(
                        self._answer(prompt),
                        stats=self._stats,
                        interrupted=interrupted,
                        stop_on_interrupt=self._typed and self._remote,
                    )
                except TooLongError:
                    prompt, forgotten = self._conversation.shorten()
                    if not forgotten:
                        raise
        finally:
            if answer is None or not (answer.text or answer.finish_reason):
                self._conversation.take_back()
            else:
                self._conversation.answer(answer.text)

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
