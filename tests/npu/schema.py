"""The operators of torch-npu wheels, from their libraries: ``python tests/npu/schema.py WHEEL ... > schema.json``.

No wheel is imported, so any version and any machine's wheels will do. A schema is registered as a string constant, and
most of them stand in the library as they are. Some of ATB's are put together by the compiler from pieces; of those only
the C++ signature is found, and where it equals that of a wheel whose schema is known, the schema is taken from there.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from pathlib import Path

_STRING = re.compile(rb"[ -~]{8,}")
_SCHEMA = re.compile(r"^((?:_?npu|_?atb)[\w.]*)(\(.*\) -> .*)$")
# What wraps atb::name for the dispatcher, mangled: its C++ type, then the length of its name, and the name.
_SIGNATURE = re.compile(r"^N3c104impl6detail24WrapFunctionIntoFunctor\S*FunctionPointerIF(.*?)EXadL_ZN3atb(\d+)(\w+)")
_LIBRARIES = ("torch_npu/lib/libtorch_npu.so", "torch_npu/lib/libop_plugin_atb.so")


def strings(wheel: Path) -> set[str]:
    """The printable constants of a wheel's libraries."""
    found: set[str] = set()
    with zipfile.ZipFile(wheel) as archive:
        for name in _LIBRARIES:
            found |= {match.group().decode() for match in _STRING.finditer(archive.read(name))}
    return found


def read_wheel(wheel: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(schemas, C++ signatures of ATB's operators) by name."""
    schemas: dict[str, str] = {}
    signatures: dict[str, str] = {}
    for text in strings(wheel):
        if match := _SCHEMA.match(text):
            schemas[match.group(1)] = match.group(2)
        elif match := _SIGNATURE.match(text):
            signatures[match.group(3)[: int(match.group(2))]] = match.group(1)
    return schemas, signatures


def module_names(wheel: Path) -> list[str]:
    """What ``torch_npu.npu``, which is ``torch.npu``, declares to have."""
    with zipfile.ZipFile(wheel) as archive:
        tree = ast.parse(archive.read("torch_npu/npu/__init__.py"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(ast.literal_eval(node.value))
    raise ValueError(f"{wheel}: torch_npu.npu has no __all__")


def version_of(wheel: Path) -> str:
    """2.13.0 of torch_npu-2.13.0-cp311-..."""
    return wheel.name.split("-")[1]


def collect(wheels: list[Path]) -> dict[str, dict[str, list[str]]]:
    """{operator: {schema: versions that have it}}."""
    read = {version_of(wheel): read_wheel(wheel) for wheel in wheels}
    known = {
        name: (schema, signatures[name])
        for schemas, signatures in read.values()
        for name, schema in schemas.items()
        if name in signatures
    }
    table: dict[str, dict[str, list[str]]] = {}
    for version, (schemas, signatures) in read.items():
        same = {name: schema for name, (schema, signature) in known.items() if signatures.get(name) == signature}
        for name, schema in {**same, **schemas}.items():
            table.setdefault(name, {}).setdefault(schema, []).append(version)
    return table


def main() -> None:
    """Print the table, one operator per line."""
    wheels = [Path(argument) for argument in sys.argv[1:]]
    if not wheels:
        sys.exit(__doc__)
    table = collect(wheels)
    everywhere = sorted(set.intersection(*(set(module_names(wheel)) for wheel in wheels)))
    print(f'{{"versions": {json.dumps([version_of(wheel) for wheel in wheels])},')
    print(f'"torch.npu": {json.dumps(everywhere)},\n"operators": {{')
    print(",\n".join(f"{json.dumps(name)}: {json.dumps(table[name])}" for name in sorted(table)))
    print("}}")


if __name__ == "__main__":
    main()
