"""Builds the emulated CANN with gcc: one library with everything, and one empty library per name the wheel asks for.

Which symbols there must be comes from the wheel itself (``nm``): those the C sources define are emulated, every other
gets a stub that stops with its name, and every operator name in the wheel's strings gets a trampoline into Python.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from functools import lru_cache
from pathlib import Path

from .environment import TORCH_NPU, home, wheel_folder
from .trampolines import assembly, operator_names

SOURCES = Path(__file__).parent / "cann"
# The names the wheel's libraries are linked with, and those it opens when running.
LIBRARIES = (
    *("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "atb"),
    *("opapi", "aclnn_math", "aclnn_ops_infer", "nnopbase"),
)
_CANN_SYMBOL = re.compile(r"acl|rt[A-Z]|Msprof|Hccl|_ZNK?3atb")


@lru_cache
def libraries() -> Path:
    """The folder of the emulated CANN, built if the sources changed since."""
    digest = hashlib.sha256(TORCH_NPU.encode())
    for path in sorted([*SOURCES.iterdir(), *Path(__file__).parent.glob("*.py")]):
        digest.update(path.read_bytes())
    folder = home() / f"cann-{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        home().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home()) as temporary:
            _build(Path(temporary))
            built = Path(temporary) / "lib"
            try:
                os.rename(built, folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
        _remove_old(folder)
    return folder


def _remove_old(current: Path) -> None:
    """Builds of other sources, but for those of today: they may be in use."""
    for other in home().glob("cann-*"):
        if other != current and time.time() - other.stat().st_mtime > 24 * 3600:
            shutil.rmtree(other, ignore_errors=True)


def _build(folder: Path) -> None:
    wheel = wheel_folder() / "torch_npu"
    (folder / "lib").mkdir()
    (folder / "trampolines.S").write_text(assembly(operator_names(wheel)))
    compile_flags = ["-O1", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-deprecated-declarations"]
    sources = sorted(SOURCES.glob("*.c"))
    _run("gcc", *compile_flags, "-c", f"-I{wheel}/include", f"-I{SOURCES}", *sources, cwd=folder)
    _run("gcc", "-c", "-fPIC", "trampolines.S", cwd=folder)
    objects = sorted(folder.glob("*.o"))
    defined = {
        line.split()[-1] for line in _run("nm", "--defined-only", *objects).splitlines() if len(line.split()) == 3
    }
    (folder / "stubs.c").write_text(_stubs(sorted(_needed(wheel) - defined)))
    main = folder / "lib" / "libascendcl.so"
    link = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libascendcl.so", "-o", main]
    _run(*link, *objects, "stubs.c", "-lpthread", "-ldl", "-lrt", cwd=folder)
    for name in LIBRARIES:
        soname = f"lib{name}.so"
        command = ["gcc", "-shared", f"-Wl,-soname,{soname}", "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN"]
        _run(*command, "-o", folder / "lib" / soname, "-x", "c", "/dev/null", "-x", "none", main)


def _needed(wheel: Path) -> set[str]:
    """The CANN symbols the wheel's libraries are linked against."""
    found: set[str] = set()
    for library in [*wheel.glob("lib/*.so"), *wheel.glob("_C*.so")]:
        names = (line.split()[-1].split("@")[0] for line in _run("nm", "-D", "--undefined-only", library).splitlines())
        found.update(name for name in names if _CANN_SYMBOL.match(name))
    return found


def _stubs(names: list[str]) -> str:
    lines = ["#include <stdio.h>", "#include <stdlib.h>"]
    for number, name in enumerate(names):
        lines.append(f'__attribute__((visibility("default"))) long stub_{number}(void) __asm__("{name}");')
        message = f"emulated Ascend: {name} is not emulated"
        lines.append(f'long stub_{number}(void) {{ fprintf(stderr, "{message}\\n"); abort(); }}')
    return "\n".join(lines) + "\n"


def _run(*command: object, cwd: Path | None = None) -> str:
    result = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{result.stderr}")
    return result.stdout
