"""Builds the C++ kernels with the package; everything else is in pyproject.toml.

Without a compiler the package installs all the same, and runs on torch's operators.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_ext import build_ext

PACKAGE_FOLDER = Path("nanovllm", "ops", "cpu", "lib")


def kernel_builder():
    """The module nanovllm.ops.cpu.build, without the package around it (which needs torch)."""
    file = Path(__file__).parent / "nanovllm" / "ops" / "cpu" / "build.py"
    spec = importlib.util.spec_from_file_location("kernel_build", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """One library per instruction set, into the wheel or, for an editable install, beside the sources."""

    def run(self) -> None:
        root = Path(__file__).parent if self.inplace or self.editable_mode else Path(self.build_lib)
        try:
            self.built = kernel_builder().build(root / PACKAGE_FOLDER)
        except (RuntimeError, OSError) as error:
            self.built = []
            print(f"NOTICE: no C++ kernels, the CPU will run on torch's operators: {error}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return [str(file) for file in self.built]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class KernelDistribution(Distribution):
    """A distribution with machine code in it."""

    def has_ext_modules(self) -> bool:
        return True


commands: dict[str, type] = {"build_ext": BuildKernels}

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1: the wheel is tagged with this Python's version
    pass
else:

    class KernelWheel(bdist_wheel):
        """The libraries know nothing of Python: one wheel per platform serves every version of it."""

        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    commands["bdist_wheel"] = KernelWheel

setup(cmdclass=commands, distclass=KernelDistribution)
