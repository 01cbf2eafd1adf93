"""Chat templates: messages to prompt text, rendered as Hugging Face's tokenizers render them.

A template is Jinja source that comes with a checkpoint, so it is run in Jinja's sandbox and sees plain data only.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from nanovllm.errors import ParameterError

if TYPE_CHECKING:
    from jinja2 import Template, nodes
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

# Marks where the final message ends in the rendered text. The space shows whether the template trims messages.
_END_MARK = "\ue000END-OF-FINAL-MESSAGE\ue000 "

TEXT_PARTS = ("text", "input_text", "output_text")


def render(
    template: str,
    messages: Sequence[Any],
    *,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """Render a conversation.

    Args:
        template: Jinja source.
        messages: dicts with "role" and "content" (OpenAI's form; content is text or a list of text parts).
        tools: tool definitions as dicts (JSON schema).
        documents: dicts for templates of retrieval models.
        add_generation_prompt: end with the header of the assistant's answer.
        continue_final_message: end inside the final message, so that the model continues it.
        **variables: whatever else the template reads.

    Raises:
        ParameterError: malformed messages, or the template refuses them.
    """
    from jinja2 import TemplateError

    if continue_final_message and add_generation_prompt:
        raise ParameterError(
            "continue_final_message and add_generation_prompt are not compatible", "continue_final_message", True
        )
    compiled, wants_parts = _compile(template)
    conversation = _plain_messages(messages, flatten=not wants_parts)
    if continue_final_message:
        _mark_end(conversation[-1])
    try:
        text = compiled.render(
            messages=conversation,
            tools=_plain_tools(tools),
            documents=_plain("documents", documents),
            add_generation_prompt=add_generation_prompt,
            **_plain("chat_template_kwargs", variables),
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise ParameterError(f"the chat template cannot render these messages: {error}", "messages", None) from error
    return _cut_at_mark(text) if continue_final_message else text


def _mark_end(message: dict[str, Any]) -> None:
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _END_MARK
        return
    for part in reversed(content or []):
        if "text" in part:
            part["text"] += _END_MARK
            return
    raise ParameterError("continue_final_message needs a final message with text", "continue_final_message", True)


def _cut_at_mark(text: str) -> str:
    mark = _END_MARK.rstrip()
    position = text.rfind(mark)
    if position < 0:
        raise ParameterError(
            "continue_final_message: the chat template leaves out the end of the final message",
            "continue_final_message",
            True,
        )
    kept = text[:position]
    # Without the mark's space the template has trimmed the message; do the same to what stands before the mark.
    return kept if text.startswith(_END_MARK, position) else kept.rstrip()


def _plain_messages(messages: Sequence[Any], flatten: bool) -> list[dict[str, Any]]:
    """A fresh copy of the conversation in the form templates expect.

    Keys that are None go (templates test whether a key is there), arguments of tool calls given as JSON text become
    data, and a content that is a list of text parts becomes text if the template expects that.
    """
    if isinstance(messages, (str, Mapping)) or not messages:
        raise ParameterError("messages must be a non-empty list of dicts with 'role' and 'content'", "messages", None)
    result = []
    for message in messages:
        plain = _plain("messages", message)
        if not isinstance(plain, dict) or "role" not in plain:
            raise ParameterError("every message must be a dict with a 'role'", "messages", message)
        plain = {key: value for key, value in plain.items() if value is not None}
        content = plain.get("content")
        if isinstance(content, list):
            texts = [_part_text(part) for part in content]
            plain["content"] = "\n".join(texts) if flatten else [{"type": "text", "text": text} for text in texts]
        for call in plain.get("tool_calls", ()):
            _parse_arguments(call)
        result.append(plain)
    return result


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"]
    raise ParameterError(f"a content part of type {kind!r} is not supported: only text is", "messages", kind)


def _parse_arguments(call: Any) -> None:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise ParameterError("every tool call must be a dict with a 'function'", "messages", call)
    arguments = function.get("arguments")
    if arguments is None or isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments) if arguments else {}
        except ValueError as error:
            raise ParameterError(
                f"arguments of a tool call must be JSON: {error}", "messages.tool_calls", arguments
            ) from error


def _plain_tools(tools: Sequence[Any] | None) -> list[Any] | None:
    if not tools:
        return None
    plain = _plain("tools", list(tools))
    if not all(isinstance(tool, dict) for tool in plain):
        raise ParameterError("tools must be a list of dicts (JSON schema)", "tools", tools)
    return plain


def _plain(name: str, value: Any) -> Any:
    """A copy made of JSON types only, so that a template can reach no method of a caller's object."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(name, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, item) for item in value]
    for base in (str, int, float):  # subclasses such as enums
        if isinstance(value, base):
            return base.__str__(value) if base is str else base(value)
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic, as the OpenAI client returns
        return _plain(name, dump())
    raise ParameterError(f"{name} must hold plain data, not {type(value).__name__}", name, value)


@lru_cache(maxsize=16)
def _compile(template: str) -> tuple[Template, bool]:
    """The compiled template, and whether it goes through a message's content part by part."""
    from jinja2 import TemplateSyntaxError

    environment = _environment()
    try:
        return environment.from_string(template), _iterates_over_content(environment.parse(template))
    except TemplateSyntaxError as error:
        raise ParameterError(f"the chat template is malformed: {error}", "chat_template", None) from error


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """The Jinja environment chat templates are written for."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """``{% generation %}`` marks what an assistant wrote, for training; here it is only what is inside."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:
        return datetime.datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _iterates_over_content(tree: nodes.Template) -> bool:
    """Whether a loop runs over ``message.content``, ``message['content']`` or a variable called ``content``."""
    from jinja2 import nodes

    for loop in tree.find_all(nodes.For):
        source: nodes.Node | None = loop.iter
        while isinstance(source, (nodes.Filter, nodes.Getitem)) and not _is_content(source):
            source = source.node  # content | list, content[1:]
        if source is not None and _is_content(source):
            return True
    return False


def _is_content(node: nodes.Node) -> bool:
    from jinja2 import nodes

    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name == "content"
