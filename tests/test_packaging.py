"""What is installed is complete, and what it needs is declared."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import nanovllm

if sys.version_info >= (3, 11):
    import tomllib
else:  # pip brings its own copy for the Pythons without one
    from pip._vendor import tomli as tomllib

ROOT = Path(nanovllm.__file__).parents[1]
PACKAGE = ROOT / "nanovllm"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTION = {"PIL": "pillow", "yaml": "pyyaml", "opentelemetry": "opentelemetry-sdk"}  # import name -> distribution

# Imported only where it is found, never installed by us: the device's own stack, another hub's client, and a faster
# event loop.
FOUND_NOT_INSTALLED = {"torch_npu", "triton", "modelscope", "uvloop"}
# Modules that are imported only where what they are written in has been found: on a device, with an extra.
WRITTEN_IN = {
    PACKAGE / "ops" / "cuda": {"triton"},
    PACKAGE / "ops" / "npu": {"triton", "torch_npu"},
    PACKAGE / "entrypoints" / "serve" / "tracing.py": {"opentelemetry_sdk"},
}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s<>=!~\[;]", requirement)[0].lower().replace("-", "_") for requirement in requirements}


def third_party_imports(file: Path) -> dict[str, bool]:
    """Top-level packages that a file imports -> whether it does so at module level."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
        for module in modules:
            top = module.split(".")[0]
            if top not in sys.stdlib_module_names and top != "nanovllm":
                found[top] = found.get(top, False) or node in tree.body
    return found


def test_every_import_is_declared():
    required = names(PROJECT["dependencies"])
    optional = set().union(*(names(extra) for extra in PROJECT["optional-dependencies"].values()))
    for file in PACKAGE.rglob("*.py"):
        for module, at_module_level in third_party_imports(file).items():
            name = DISTRIBUTION.get(module, module).lower().replace("-", "_")
            found = any(name in libraries and file.is_relative_to(place) for place, libraries in WRITTEN_IN.items())
            if at_module_level and not found:
                assert name in required, f"{file}: {module} is imported whenever the module is, and not a dependency"
            else:
                assert name in required | optional | FOUND_NOT_INSTALLED, f"{file}: {module} is not declared"


def test_extras_bring_what_they_promise():
    extras = PROJECT["optional-dependencies"]
    assert {"hf", "dev", "all"} <= set(extras)
    everything = re.findall(r"[\w-]+", extras["all"][0].partition("[")[2])
    assert set(everything) == set(extras) - {"all", "dev"}
    assert len(PROJECT["dependencies"]) <= 15


def test_the_version_is_one():
    assert PROJECT["version"] == nanovllm.__version__


def test_the_command_is_installed():
    module, _, function = PROJECT["scripts"]["nanovllm"].partition(":")
    assert callable(getattr(import_module(module), function))


def test_every_public_name_exists():
    for name in nanovllm.__all__:
        assert getattr(nanovllm, name) is not None
    assert set(nanovllm.__all__) <= set(dir(nanovllm))


def test_the_wheel_holds_all_that_runs_and_nothing_else(tmp_path: Path):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "nanovllm", "csrc"):
        (source / name).symlink_to(ROOT / name)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=source,
        env={**os.environ, "PATH": "", "CXX": ""},  # no compiler: the wheel is complete all the same, and quickly made
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    wheel = tmp_path / done.stdout.splitlines()[-1]
    assert wheel.name.startswith(f"nano_vllm_ascend-{nanovllm.__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "installed")
    files = {file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    sources = {file for file in files if file.suffix != ".so" and not file.name.startswith(".")}
    assert packed == {str(file.relative_to(ROOT)) for file in sources}

    outside = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-m", "nanovllm", "--version"]
    done = subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True, check=True)
    assert done.stdout == f"{nanovllm.__version__}\n"
