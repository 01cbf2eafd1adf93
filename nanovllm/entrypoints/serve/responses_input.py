"""The ``input`` of a response as the messages of a conversation, and its output as one more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanovllm.errors import ParameterError

TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
ROLES = ("user", "assistant", "system", "developer")

Message = dict[str, Any]


def conversation(given: str | Sequence[Any], where: str = "input") -> list[Message]:
    """Messages of input items. What the assistant thought, said and called in a row becomes one message.

    Raises:
        ParameterError: there are none, or an item or a content part that this version cannot read, by its place.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not given:
        raise ParameterError("must not be empty", where, given)
    messages: list[Message] = []
    for index, item in enumerate(given):
        place = f"{where}[{index}]"
        kind = item.get("type") or "message"
        if kind == "message":
            _add_message(messages, item, place)
        elif kind == "reasoning":
            _assistant(messages, "reasoning")["reasoning"] = _text(item.get("content") or item.get("summary"), place)
        elif kind == "function_call":
            call = {"name": _string(item, "name", place), "arguments": _string(item, "arguments", place)}
            calls = _assistant(messages, "tool_calls").setdefault("tool_calls", [])
            calls.append({"id": _string(item, "call_id", place), "type": "function", "function": call})
        elif kind == "function_call_output":
            output = _text(item.get("output"), f"{place}.output")
            messages.append({"role": "tool", "tool_call_id": _string(item, "call_id", place), "content": output})
        else:
            raise ParameterError("items of this type are not supported", f"{place}.type", kind)
    return messages


def with_instructions(instructions: str | None, messages: list[Message]) -> list[Message]:
    """The conversation under its instructions: the first message, joined with a system message that is there."""
    if not instructions:
        return messages
    if messages and messages[0]["role"] in ("system", "developer"):
        first, *rest = messages
        return [{**first, "content": f"{instructions}\n\n{first['content']}"}, *rest]
    return [{"role": "system", "content": instructions}, *messages]


def _add_message(messages: list[Message], item: dict[str, Any], place: str) -> None:
    role = item.get("role")
    if role not in ROLES:
        raise ParameterError(f"must be one of {', '.join(ROLES)}", f"{place}.role", role)
    content = _text(item.get("content"), f"{place}.content")
    if role == "assistant":
        _assistant(messages, "content")["content"] = content
    else:
        messages.append({"role": role, "content": content})


def _assistant(messages: list[Message], part: str) -> Message:
    """The assistant's message that the next ``part`` belongs to: the last one if nothing of a later kind is in it."""
    order = ("reasoning", "content", "tool_calls")
    later = order[order.index(part) + (part == "tool_calls") :]
    if not messages or messages[-1]["role"] != "assistant" or any(messages[-1].get(name) for name in later):
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ParameterError("must be text or a list of content parts", place, content)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in (*TEXT_PARTS, "refusal") or not isinstance(text, str):
            raise ParameterError("this version reads text only", f"{place}[{index}].type", kind)
        texts.append(text)
    return "".join(texts)


def _string(item: dict[str, Any], name: str, place: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise ParameterError("must be a string", f"{place}.{name}", value)
    return value
