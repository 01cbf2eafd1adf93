"""Compile csrc/ into one shared library per instruction set. Standard library only: setup.py uses it, too.

``python -m nanovllm.ops.cpu.build`` builds in place, beside this file. The libraries know neither Python nor torch, so
one build serves every version of them.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[3] / "csrc"
LIBRARIES = Path(__file__).resolve().parent / "lib"

# Contraction is off: csrc/simd.h says where products are fused with sums. No fast-math: NaN and infinity are used.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-strict-aliasing", "-fvisibility=hidden", "-fno-gnu-unique", "-Wno-uninitialized", "-Wno-psabi"),
)
LINK_FLAGS = ("-shared", "-pthread", "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL")

# Best first.
X86_INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "avx512_bf16": ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"),
    "avx512": ("-march=x86-64-v4",),
    "avx2": ("-march=x86-64-v3",),
    "generic": (),
}


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """The instruction sets to compile for on this kind of machine, best first, and the compiler's flags for them."""
    return X86_INSTRUCTION_SETS if platform.machine().lower() in ("x86_64", "amd64") else {"generic": ()}


def library_file(instruction_set: str) -> str:
    """The name of the library for an instruction set."""
    return f"kernels_{instruction_set}.so"


def find_compiler() -> str | None:
    """A C++ compiler: ``$CXX``, or the first of the usual names on the path."""
    named = os.environ.get("CXX")
    return next((found for name in (named, "g++", "c++", "clang++") if name and (found := shutil.which(name))), None)


def build(target: Path = LIBRARIES, extra_flags: tuple[str, ...] = ()) -> list[Path]:
    """Compile every library into the folder ``target``.

    Returns the files. Raises RuntimeError with the compiler's message if there is none or it fails.
    """
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler found (g++ or clang++; set CXX to name another)")
    sources = sorted(SOURCES.glob("*.cpp"))
    if not sources:
        raise RuntimeError(f"no sources in {SOURCES}")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects: dict[str, list[Path]] = {}
        jobs = []
        for name, flags in instruction_sets().items():
            objects[name] = [Path(folder) / f"{name}_{source.stem}.o" for source in sources]
            for source, file in zip(sources, objects[name], strict=True):
                jobs.append([compiler, *FLAGS, *flags, *extra_flags, "-c", str(source), "-o", str(file)])
        list(pool.map(_run, jobs))
        built = []
        for name, files in objects.items():
            library = Path(folder) / library_file(name)
            _run([compiler, *LINK_FLAGS, *extra_flags, *map(str, files), "-o", str(library)])
            built.append(Path(shutil.move(library, target / library.name)))  # whole or not at all
    return built


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    for path in build(Path(sys.argv[1]) if len(sys.argv) > 1 else LIBRARIES):
        print(path)
