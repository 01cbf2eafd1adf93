"""Anthropic's messages, tools and choices as those of chat completions."""

from __future__ import annotations

import json
from typing import Any

from nanovllm.entrypoints.serve.protocol.messages import AnthropicMessage, Blocks, CountTokensRequest
from nanovllm.errors import ParameterError

Message = dict[str, Any]


def chat_fields(body: CountTokensRequest) -> dict[str, Any]:
    """What the prompt depends on, as fields of a chat request. An assistant's last message is to be continued.

    Raises:
        ParameterError: a content block or a tool that this version cannot read, by its place.
    """
    messages: list[Message] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
    for index, message in enumerate(body.messages):
        messages += _chat_messages(message, f"messages[{index}].content")
    fields: dict[str, Any] = {"model": body.model, "messages": messages, "tools": _tools(body)}
    choice = body.tool_choice
    if choice is not None:
        named = {"type": "function", "function": {"name": choice.name}}
        fields["tool_choice"] = {"any": "required", "tool": named}.get(choice.type, choice.type)
        fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    if body.messages[-1].role == "assistant":
        if "content" not in messages[-1] or "tool_calls" in messages[-1]:
            raise ParameterError("only text can be continued", f"messages[{len(body.messages) - 1}]", "...")
        fields |= {"add_generation_prompt": False, "continue_final_message": True}
    return fields


def _chat_messages(message: AnthropicMessage, place: str) -> list[Message]:
    """One message as chat messages: the results of tools, and what is said besides."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[Message] = []
    said: Message = {"role": message.role}
    for index, block in enumerate(message.content):
        where = f"{place}[{index}]"
        kind = block.get("type")
        if kind == "text":
            said["content"] = said.get("content", "") + _string(block, "text", where)
        elif kind == "thinking" and message.role == "assistant":
            said["reasoning"] = said.get("reasoning", "") + _string(block, "thinking", where)
        elif kind == "tool_use" and message.role == "assistant":
            arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
            function = {"name": _string(block, "name", where), "arguments": arguments}
            call = {"id": _string(block, "id", where), "type": "function", "function": function}
            said.setdefault("tool_calls", []).append(call)
        elif kind == "tool_result" and message.role == "user":
            content = _text(block.get("content") or "", f"{where}.content")
            content = f"Error: {content}" if block.get("is_error") else content
            results.append({"role": "tool", "tool_call_id": _string(block, "tool_use_id", where), "content": content})
        else:
            raise ParameterError(f"blocks of this type are not supported here ({message.role})", f"{where}.type", kind)
    if len(said) > 1:
        return [*results, said]
    return results or [{**said, "content": ""}]


def _tools(body: CountTokensRequest) -> list[dict[str, Any]] | None:
    tools = []
    for index, tool in enumerate(body.tools or ()):
        if tool.type not in (None, "custom"):
            raise ParameterError("the server has no tools of its own", f"tools[{index}].type", tool.type)
        function: dict[str, Any] = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
        function = {name: value for name, value in function.items() if value is not None}
        if tool.strict is not None:
            function["strict"] = tool.strict
        tools.append({"type": "function", "function": function})
    return tools or None


def _text(blocks: Blocks, place: str) -> str:
    if isinstance(blocks, str):
        return blocks
    texts = []
    for index, block in enumerate(blocks):
        if not isinstance(block, dict) or block.get("type") != "text":
            kind = block.get("type") if isinstance(block, dict) else block
            raise ParameterError("this version reads text only", f"{place}[{index}].type", kind)
        texts.append(_string(block, "text", f"{place}[{index}]"))
    return "\n".join(texts)


def _string(block: dict[str, Any], name: str, place: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise ParameterError("must be a string", f"{place}.{name}", value)
    return value
