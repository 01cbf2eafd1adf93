"""``nanovllm collect-env``: the machine and the installation, for a bug report.

It never fails: what cannot be found out is reported as such. Device libraries are loaded in a process of their own, so
that a broken one can neither crash nor hang the report.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from nanovllm import __version__
from nanovllm.entrypoints.doctor import ascend, probes

PACKAGES = (
    "torch", "torch_npu", "triton", "numpy", "tokenizers", "safetensors", "jinja2", "huggingface_hub", "tqdm",
    "transformers", "modelscope", "starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance", "vllm",
)  # fmt: skip

# Instruction sets that decide which kernels and number formats are fast: x86, then Arm.
CPU_FLAGS = (
    "avx2", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16",
    "amx_int8", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip

_VARIABLES = re.compile(
    r"(NANOVLLM|VLLM|OMP|MKL|KMP|GOMP|OPENBLAS|ATEN|DNNL|ONEDNN|TORCH|PYTORCH|CUDA|NCCL|ASCEND|HCCL|HF|"
    r"TRANSFORMERS|TOKENIZERS|MODELSCOPE|TRITON)_.*|.*_VISIBLE_DEVICES|LD_LIBRARY_PATH|LD_PRELOAD|PYTHONPATH|"
    r"VIRTUAL_ENV|CONDA_PREFIX|(HTTPS?|ALL|NO)_PROXY|LANG|LC_ALL",
    re.IGNORECASE,
)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL|AUTH", re.IGNORECASE)
_HARMLESS = re.compile(r"TOKENIZERS_.*", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the report."""
    report = collect()
    if arguments.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _print_section(report)
    return 0


def collect() -> dict[str, Any]:
    """The report, as plain data. Raises nothing."""
    sections: dict[str, Callable[[], Any]] = {
        "nanovllm": lambda: {"version": __version__, "folder": str(Path(__file__).parents[2])},
        "Python": lambda: {"version": sys.version.replace("\n", " "), "executable": sys.executable},
        "system": lambda: {"platform": platform.platform(), "libc": " ".join(platform.libc_ver()), **_distribution()},
        "CPU": _cpu,
        "memory": _memory,
        "packages": lambda: {name: _version(name) for name in PACKAGES},
        "torch": lambda: _answer(probes.TORCH),
        "GPU": _gpu,
        "NPU": _npu,
        "environment": _environment,
    }
    return {name: _attempt(section) for name, section in sections.items()}


def summary() -> dict[str, Any]:
    """A few lines on the machine and the libraries, to stand beside a measurement."""
    cpu = _cpu()
    return {
        "cpu": cpu["model"],
        "logical_cpus": len(cpu["CPUs of this process"] or range(cpu["logical CPUs"])),
        "instruction_sets": cpu["instruction sets"],
        "memory": _memory()["total"],
        "system": platform.platform(),
        "python": platform.python_version(),
        "nanovllm": __version__,
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def _attempt(section: Callable[[], Any]) -> Any:
    try:
        return section()
    except Exception as error:
        return f"could not be found out: {type(error).__name__}: {error}"


def _distribution() -> dict[str, str]:
    try:
        return {"distribution": platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")}
    except OSError:
        return {}


def _cpu() -> dict[str, Any]:
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "logical CPUs": os.cpu_count(),
        "CPUs of this process": affinity,
        "instruction sets": [flag for flag in CPU_FLAGS if flag in flags],
        **_control_group("cpu.max"),
    }


def _memory() -> dict[str, Any]:
    from nanovllm.platforms import CpuPlatform

    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "total": _gib(total),
        "available to this process": _gib(CpuPlatform().available_memory()),
        **_control_group("memory.max"),
    }


def _control_group(name: str) -> dict[str, str]:
    """A limit of the container as the kernel words it; "max" is none."""
    file = Path("/sys/fs/cgroup") / name
    return {f"control group {name}": file.read_text().strip()} if file.is_file() else {}


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    driver = Path("/proc/driver/nvidia/version")
    return {"NVIDIA driver": driver.read_text().splitlines()[0] if driver.is_file() else "not loaded"}


def _npu() -> Any:
    version = ascend.torch_npu_version()
    return {**ascend.facts(), "torch_npu": "not installed" if version is None else _answer(probes.NPU)}


def _answer(code: str) -> Any:
    """What another Python answers; a text that says what went wrong if it cannot."""
    answer = probes.ask(code)
    return answer.failure if answer.value is None else answer.value


def _environment() -> dict[str, str]:
    chosen = {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)}
    return {name: _without_secret(name, value) for name, value in chosen.items()}


def _without_secret(name: str, value: str) -> str:
    if _SECRET.search(name) and not _HARMLESS.fullmatch(name):
        return "(set, not shown)"
    return re.sub(r"//[^/@\s]+@", "//(not shown)@", value)  # user:password in a URL


def _print_section(section: dict[str, Any], indent: str = "") -> None:
    for key, value in section.items():
        if isinstance(value, dict):
            print(f"{indent}{key}:")
            _print_section(value, indent + "  ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            print(f"{indent}{key}: {'none' if text in (None, '') else text}")
