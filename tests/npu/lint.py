"""Calls of torch_npu in a source tree, held against the schemas of several torch-npu versions (schema.json).

No wheel is needed: a wrong keyword, a missing argument or an operator that one of the versions lacks is found by
reading. What cannot be read (``*args``, ``**kwargs``) is a finding too.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SCHEMA = Path(__file__).with_name("schema.json")
_OWNERS = ("torch_npu", "torch.ops.npu", "torch.ops.atb")
_PARAMETER = re.compile(r"^(?P<type>.+?)\s+(?P<name>\w+)\s*(?P<default>=.*)?$")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a schema."""

    name: str
    required: bool
    keyword_only: bool


def parameters(schema: str) -> list[Parameter]:
    """The parameters of ``(Tensor x, *, int? k=None) -> Tensor``."""
    inside = schema[1 : _closing(schema)]
    found, keyword_only = [], False
    for part in _split(inside):
        if part.startswith("*"):
            keyword_only = True
            part = part[1:].strip(" ,")
            if not part:
                continue
        match = _PARAMETER.match(part)
        if match is None:
            raise ValueError(f"cannot read {part!r} of {schema!r}")
        found.append(Parameter(match["name"], match["default"] is None, keyword_only))
    return found


def _closing(text: str) -> int:
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    raise ValueError(f"no closing parenthesis in {text!r}")


def _split(text: str) -> Iterator[str]:
    depth, start = 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            yield text[start:place].strip()
            start = place + 1
    if text[start:].strip():
        yield text[start:].strip()


class Schemas:
    """What the versions of torch-npu have."""

    def __init__(self, file: Path = SCHEMA) -> None:
        table = json.loads(file.read_text())
        self.versions: list[str] = table["versions"]
        self.module: set[str] = set(table["torch.npu"])
        self._operators: dict[str, dict[str, list[str]]] = table["operators"]

    def overloads(self, name: str, version: str) -> list[list[Parameter]]:
        """The parameters of every overload of an operator in a version: ``name`` and ``name.something``."""
        return [
            parameters(schema)
            for known, schemas in self._operators.items()
            if known == name or known.startswith(name + ".")
            for schema, versions in schemas.items()
            if version in versions
        ]


def objection(call: ast.Call, signature: list[Parameter]) -> str | None:
    """Why the call does not fit the signature, or None."""
    if any(isinstance(argument, ast.Starred) for argument in call.args) or any(k.arg is None for k in call.keywords):
        return "*args and **kwargs cannot be checked"
    positional = [parameter for parameter in signature if not parameter.keyword_only]
    if len(call.args) > len(positional):
        return f"{len(call.args)} positional arguments, at most {len(positional)} are taken"
    given = {parameter.name for parameter in positional[: len(call.args)]}
    names = {parameter.name for parameter in signature}
    for keyword in call.keywords:
        assert keyword.arg is not None
        if keyword.arg not in names:
            return f"no parameter {keyword.arg!r}"
        if keyword.arg in given:
            return f"{keyword.arg!r} is given twice"
        given.add(keyword.arg)
    missing = [parameter.name for parameter in signature if parameter.required and parameter.name not in given]
    return f"{', '.join(missing)} missing" if missing else None


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Every call of an operator of torch_npu, with the operator's name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if owner in _OWNERS and "npu" in node.func.attr:
                yield node, node.func.attr


def findings(source: str, schemas: Schemas) -> Iterator[tuple[int, str]]:
    """(line, complaint) for everything in a file that some version does not have."""
    tree = ast.parse(source)
    for call, name in calls(tree):
        for version in schemas.versions:
            overloads = schemas.overloads(name, version)
            if not overloads:
                yield call.lineno, f"torch-npu {version} has no {name}"
                continue
            objections = [objection(call, signature) for signature in overloads]
            if None not in objections:
                yield call.lineno, f"{name}: {objections[0]} (torch-npu {version})"
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and ast.unparse(node.value) in ("torch.npu", "torch_npu.npu")
            and node.attr not in schemas.module
        ):
            yield node.lineno, f"torch.npu has no {node.attr}"


def lint(folder: Path, schemas: Schemas) -> tuple[list[str], int]:
    """Complaints about the Python files of a folder, and the number of operator calls that were read."""
    complaints, count = [], 0
    for file in sorted(folder.rglob("*.py")):
        source = file.read_text()
        count += sum(1 for _ in calls(ast.parse(source)))
        complaints += [f"{file.relative_to(folder.parent)}:{line}: {text}" for line, text in findings(source, schemas)]
    return complaints, count


def main() -> None:
    """``python tests/npu/lint.py [FOLDER]``"""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2] / "nanovllm"
    complaints, count = lint(folder, Schemas())
    print("\n".join(complaints) or f"{count} calls of torch_npu fit")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
