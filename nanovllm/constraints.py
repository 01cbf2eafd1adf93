"""What may be asked of the form of an output. Its meaning is given by ``nanovllm.engine.structured``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanovllm.errors import ParameterError

CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass
class StructuredOutputsParams:
    """A constraint on the form of the output: exactly one of the first six fields is set.

    Attributes:
        json: JSON schema, as text or as a dict.
        regex: regular expression the whole output matches.
        choice: strings of which the output is one.
        grammar: context-free grammar (Lark or GBNF).
        json_object: any JSON object.
        structural_tag: JSON description of tags with a schema inside each.
        disable_any_whitespace: allow no white space between JSON tokens.
        disable_additional_properties: allow only properties the schema names.
        whitespace_pattern: regular expression of the white space allowed between JSON tokens.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None

    @property
    def kind(self) -> str:
        """Which constraint it is: the name of the one of the first six fields that is set."""
        return next(name for name in CONSTRAINTS if getattr(self, name) is not None)

    def __post_init__(self) -> None:
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ParameterError(
                "You can only use one kind of structured outputs constraint but multiple are specified: "
                f"{', '.join(given)}",
                "structured_outputs",
                given,
            )
        if not given:
            raise ParameterError(
                f"You must use one kind of structured outputs constraint: one of {', '.join(CONSTRAINTS)}",
                "structured_outputs",
                None,
            )
        if self.choice is not None and not (self.choice and all(isinstance(item, str) for item in self.choice)):
            raise ParameterError("choice must be a non-empty list of strings", "structured_outputs.choice", self.choice)
        for name in ("regex", "grammar", "structural_tag", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise ParameterError(f"{name} must be a non-empty string", f"structured_outputs.{name}", value)
        if self.json is not None and (not isinstance(self.json, (str, dict)) or self.json == ""):
            raise ParameterError("json must be a schema, as text or as a dict", "structured_outputs.json", self.json)


@dataclass
class GuidedDecodingParams(StructuredOutputsParams):
    """`StructuredOutputsParams` under the name it once had, for ``SamplingParams(guided_decoding=...)``.

    Attributes:
        backend, backend_was_auto, disable_fallback: without effect, there is one backend.
    """

    backend: str | None = None
    backend_was_auto: bool = False
    disable_fallback: bool = False
