"""The functions a request offers, and which of them the model is to call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanovllm.errors import ParameterError
from nanovllm.parsers.schema import schema_types


@dataclass(frozen=True)
class Function:
    """One function of a request.

    Attributes:
        parameters: JSON schema of its arguments.
        strict: the arguments must follow the schema whenever it is called.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False

    @property
    def properties(self) -> Mapping[str, Any]:
        """Parameter -> its schema."""
        properties = self.parameters.get("properties")
        return properties if isinstance(properties, Mapping) else {}

    def types(self, parameter: str) -> frozenset[str]:
        """The JSON types a parameter may have; none if the schema does not say."""
        return schema_types(self.properties.get(parameter), self.parameters)


class Tools:
    """The functions of a request by name."""

    def __init__(self, functions: Sequence[Function] = ()) -> None:
        self._functions = {function.name: function for function in functions}

    @classmethod
    def read(cls, tools: Sequence[Any] | None) -> Tools:
        """From a request's ``tools``: ``{"type": "function", "function": {"name", "parameters", "strict"}}``.

        Raises:
            ParameterError: a tool is no function, has no name, or a name twice.
        """
        functions = [_function(tool, f"tools[{index}]") for index, tool in enumerate(tools or ())]
        names = [function.name for function in functions]
        for name in names:
            if names.count(name) > 1:
                raise ParameterError(f"two tools have the name {name!r}: rename one", "tools", name)
        return cls(functions)

    def __iter__(self) -> Iterator[Function]:
        return iter(self._functions.values())

    def __len__(self) -> int:
        return len(self._functions)

    def __contains__(self, name: object) -> bool:
        return name in self._functions

    def get(self, name: str) -> Function:
        """The function ``name``; one without a schema if the request has none of that name."""
        return self._functions.get(name) or Function(name)


@dataclass(frozen=True)
class ToolChoice:
    """What a request's ``tool_choice`` asks for.

    Attributes:
        mode: "none", "auto", "required" or "named".
        name: the function to call, if it is named.
    """

    mode: str
    name: str | None = None

    @classmethod
    def read(cls, choice: Any, tools: Tools) -> ToolChoice:
        """From the field's value; None means "auto" if there are tools.

        Raises:
            ParameterError: an unknown value, a function that is not among the tools, or a call required without tools.
        """
        if choice is None:
            return cls("auto" if len(tools) else "none")
        if choice == "none":
            return cls("none")
        if choice in ("auto", "required"):
            if not len(tools):
                raise ParameterError(f"tool_choice {choice!r} needs tools: give some", "tool_choice", choice)
            return cls(choice)
        name = None
        if isinstance(choice, Mapping) and choice.get("type") == "function":
            inner = choice.get("function")
            name = inner.get("name") if isinstance(inner, Mapping) else choice.get("name")
        if not isinstance(name, str):
            raise ParameterError(
                'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}',
                "tool_choice",
                choice,
            )
        if name not in tools:
            known = ", ".join(function.name for function in tools) or "there are none"
            raise ParameterError(
                f"tool_choice names a function that is not among the tools ({known})", "tool_choice", name
            )
        return cls("named", name)


def _function(tool: Any, where: str) -> Function:
    kind = tool.get("type", "function") if isinstance(tool, Mapping) else None
    if kind != "function":
        raise ParameterError("a tool must be of type function", f"{where}.type", kind)
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ParameterError("a tool needs a function with a name", f"{where}.function", function)
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ParameterError("parameters must be a JSON schema object", f"{where}.function.parameters", parameters)
    return Function(function["name"], parameters, bool(function.get("strict")))
