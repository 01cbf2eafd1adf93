"""From a conversation to what the engine takes, and from the engine's text to reasoning, content and tool calls.

`prepare_chat` is what ``/v1/chat/completions``, ``/v1/responses`` and ``/v1/messages`` share.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from nanovllm.entrypoints.serve.admission import Ticket
from nanovllm.entrypoints.serve.context import ServeContext
from nanovllm.entrypoints.serve.prompts import LONG_PROMPT, truncated
from nanovllm.entrypoints.serve.protocol.chat import ChatCompletionRequest
from nanovllm.errors import ParameterError
from nanovllm.inputs import TokensPrompt
from nanovllm.outputs import RequestOutput
from nanovllm.parsers import REASONING_PARSERS, AnswerParser, make_answer_parser, tool_constraint
from nanovllm.parsers.tools import ToolChoice, Tools
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

DEFAULT_TOOL_PARSER = "hermes"  # the form in which required calls are asked for if the server names no parser

# What a template raises that meets values it was not written for.
_TEMPLATE_FAULTS = (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


@dataclass
class ChatTurn:
    """A request for the next message of a conversation, ready for the engine.

    Attributes:
        ticket: what the request was let in with.
        priority: the engine's.
        call_id: the answer's id.
        model: the name the answer carries.
        role: of the answer.
        prompt: the rendered conversation.
        params: how to sample.
        choice: how tools are to be called.
        prefix: text the answer begins with (``echo``).
    """

    context: ServeContext
    request: ChatCompletionRequest
    ticket: Ticket
    priority: int
    call_id: str
    model: str
    role: str
    prompt: TokensPrompt
    params: SamplingParams
    choice: ToolChoice
    tools: list[dict[str, Any]] | None
    template_kwargs: dict[str, Any]
    prefix: str

    def generate(self) -> AsyncGenerator[RequestOutput, None]:
        """The engine's outputs: deltas if the request streams, else one at the end."""
        engine, name = self.context.engine, self.context.engine_id(self.call_id)
        return engine.generate(self.prompt, self.params, name, priority=self.priority, caller=self.ticket)

    @property
    def tool_parser(self) -> str | None:
        """The parser that finds calls in the answer; None if none are looked for."""
        if self.choice.mode == "none":
            return None
        return self.context.args.tool_call_parser or DEFAULT_TOOL_PARSER

    @property
    def parses(self) -> bool:
        """Whether answers may hold more than content."""
        return bool(self.context.args.reasoning_parser or self.tool_parser)

    def make_parser(self) -> AnswerParser:
        """A parser for one answer."""
        return make_answer_parser(
            reasoning_parser=self.context.args.reasoning_parser,
            tool_parser=self.tool_parser,
            tools=self.tools,
            tool_choice=self.request.tool_choice if self.tools else None,
            chat_template_kwargs=self.template_kwargs,
            prompt=self.prompt.get("prompt"),
            continue_final_message=self.request.continue_final_message,
            hold_calls=not self.request.stream,
        )

    def finish_reason(self, reason: str | None, num_calls: int) -> str | None:
        """What a client is told of the end of an answer with so many tool calls."""
        return "tool_calls" if reason == "stop" and num_calls and self.choice.mode != "named" else reason

    def max_calls(self) -> int | None:
        """Most tool calls an answer may hold."""
        return 1 if self.request.parallel_tool_calls is False else None


async def prepare_chat(context: ServeContext, request: ChatCompletionRequest, call_id: str, ticket: Ticket) -> ChatTurn:
    """Check a request and render its conversation.

    Raises:
        ParameterError: it cannot be honoured.
        ServeError: there is no such model, or no room.
    """
    args = context.args
    model = context.model_name(request.model)
    context.warn_unknown(request.unknown_fields())
    context.check_priority(request.priority)
    priority = ticket.priority(request.priority)
    tools = _tools(request)
    choice = _tool_choice(context, request, tools)
    constraint = None
    if choice.mode != "none":
        parser = args.tool_call_parser or DEFAULT_TOOL_PARSER
        parallel = request.parallel_tool_calls is not False
        content = request.constraint()
        constraint = tool_constraint(parser, tools, request.tool_choice, parallel, context.token_id, content)
    kind = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
    params = request.params(context.generation_defaults, constraint, output_kind=kind)
    if choice.mode != "none" or _marks_are_special(context):
        params.skip_special_tokens = False  # the marks of calls and reasoning may be special tokens
    ticket.expect(params.n)
    prompt, variables = await render_messages(context, request, any_length=request.truncate_prompt_tokens is not None)
    last = request.messages[-1]
    role = args.response_role if request.add_generation_prompt else last.role
    prefix = last.content if request.echo and last.role == role and isinstance(last.content, str) else ""
    context.log_request(
        call_id, prompt.get("prompt", ""), params, {"user": request.user, "session_id": request.session_id}
    )
    return ChatTurn(
        context, request, ticket, priority, call_id, model, role, prompt, params, choice, tools, variables, prefix or ""
    )


def _tool_choice(
    context: ServeContext, request: ChatCompletionRequest, tools: list[dict[str, Any]] | None
) -> ToolChoice:
    asked = None if request.tool_choice in ("auto", "none") and not tools else request.tool_choice
    choice = ToolChoice.read(asked, Tools.read(tools))
    args = context.args
    if choice.mode == "auto" and not args.enable_auto_tool_choice:
        raise ParameterError(
            '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set', "tool_choice",
            "auto",
        )  # fmt: skip
    return choice


def _template_kwargs(context: ServeContext, request: ChatCompletionRequest) -> dict[str, Any]:
    """Variables of the template: the server's, those that fields stand for, the request's own."""
    variables = dict(context.args.default_chat_template_kwargs)
    if request.reasoning_effort is not None:
        variables["reasoning_effort"] = request.reasoning_effort
        variables["enable_thinking"] = request.reasoning_effort != "none"
    if request.documents is not None:
        variables["documents"] = request.documents
    variables.update(request.chat_template_kwargs or {})
    return variables


async def render_messages(
    context: ServeContext, request: ChatCompletionRequest, any_length: bool = True
) -> tuple[TokensPrompt, dict[str, Any]]:
    """The conversation as a prompt, and the template's variables.

    Args:
        any_length: tokenise also what is far too long for the context.

    Raises:
        ParameterError: the template refuses it, or it is far too long.
    """
    messages = [message.as_dict() for message in request.messages]
    tools = _tools(request)
    variables = _template_kwargs(context, request)
    template = _own_template(context, request)
    source = context.tokenizer.get_chat_template(template, tools)
    if "developer" not in source:  # OpenAI's newer name of the role
        for message in messages:
            if message["role"] == "developer":
                message["role"] = "system"

    def render() -> TokensPrompt:
        try:
            rendered = context.engine.input.render_chat(
                messages,
                tools=tools,
                chat_template=template,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
                chat_template_kwargs=variables,
                any_length=any_length,
            )
        except _TEMPLATE_FAULTS as error:
            json.dumps([messages, tools, variables], ensure_ascii=False).encode()  # names text that is not Unicode
            raise ParameterError(
                f"the chat template fails on this request: {type(error).__name__}: {error}",
                "chat_template_kwargs",
                sorted(variables),
            ) from error
        if request.add_special_tokens:
            rendered["prompt_token_ids"] = context.tokenizer.encode(rendered["prompt"])
        return rendered

    length = sum(len(str(message.get("content", ""))) for message in messages)
    prompt = await asyncio.to_thread(render) if length > LONG_PROMPT or tools else render()
    prompt["prompt_token_ids"] = truncated(prompt["prompt_token_ids"], request, context)
    if request.cache_salt is not None:
        prompt["cache_salt"] = request.cache_salt
    return prompt, variables


def _tools(request: ChatCompletionRequest) -> list[dict[str, Any]] | None:
    """The tools the model is told of: none if it is not to call any."""
    if request.tool_choice == "none":
        return None
    return [tool.model_dump() for tool in request.tools] if request.tools else None


def _own_template(context: ServeContext, request: ChatCompletionRequest) -> str | None:
    """The template a request brings: the name of one of the model's, or, if the server trusts it, its text."""
    asked = request.chat_template or (request.chat_template_kwargs or {}).get("chat_template")
    if asked is None or (isinstance(asked, str) and asked in context.tokenizer.chat_templates):
        return asked
    if not context.args.trust_request_chat_template:
        raise ParameterError(
            "Chat template is passed with request, but --trust-request-chat-template is not set. "
            "Refused request with untrusted chat template.",
            "chat_template",
            "...",
        )
    if not isinstance(asked, str) or "{" not in asked:  # never a path: a request reads no files
        raise ParameterError("must be the text of a template", "chat_template", asked)
    return asked


def _marks_are_special(context: ServeContext) -> bool:
    name = context.args.reasoning_parser
    if not name:
        return False
    return context.token_id(REASONING_PARSERS[name].end) in context.tokenizer.all_special_ids


def make_call_id() -> str:
    """An id for a tool call."""
    return f"chatcmpl-tool-{uuid.uuid4().hex[:16]}"
