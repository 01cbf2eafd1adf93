"""Which JSON types a schema admits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_REFERENCES = 16  # in a row; more is a circle


def resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """``schema`` with a ``$ref`` into ``root`` followed; as it is if it leads nowhere."""
    found = schema
    for _ in range(MAX_REFERENCES):
        reference = found.get("$ref") if isinstance(found, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return found
        found = root
        for part in reference[2:].split("/"):
            found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return schema


def schema_types(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """Names of the JSON types the schema admits; none if it does not say."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping):
        return frozenset()
    kinds = schema.get("type")
    types = {kinds} if isinstance(kinds, str) else {kind for kind in kinds or () if isinstance(kind, str)}
    if types:
        return frozenset(types)
    for value in allowed_values(schema) or ():
        types.add(type_of(value))
    for key in ("anyOf", "oneOf", "allOf"):
        for choice in schema.get(key) or ():
            types |= schema_types(choice, root)
    return frozenset(types)


def allowed_values(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values of an ``enum`` or ``const``; None if there is neither."""
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return list(values) if isinstance(values, (list, tuple)) else None


def type_of(value: Any) -> str:
    """The JSON type of a Python value."""
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object")
