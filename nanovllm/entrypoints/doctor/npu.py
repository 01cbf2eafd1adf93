"""Checks of an Ascend NPU: device, driver, CANN, torch-npu, whether their versions go together, and the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from nanovllm.entrypoints.doctor import ascend, probes
from nanovllm.entrypoints.doctor.ascend_versions import (
    INSTALL,
    OLDEST_DRIVER,
    RELEASES,
    numbers,
    release_of,
    series,
    torch_of,
)
from nanovllm.entrypoints.doctor.findings import Finding, ok, problem, warning

_DOCKER = "in Docker: " + " ".join(f"--device /dev/{name}" for name in ("davinci0", *ascend.DEVICE_SERVICES))


def check_npu(wanted: bool, torch_version: str | None) -> Iterator[Finding]:
    """Everything about Ascend.

    Args:
        wanted: the engine is to run on an NPU, so that there being none is a problem.
        torch_version: the installed torch, None if it is not known.
    """
    if os.environ.get("NANOVLLM_NPU_EMULATED") == "1":
        yield warning("Ascend", "emulated: torch-npu runs, but there is no NPU", "unset NANOVLLM_NPU_EMULATED")
        yield from check_import()
        return
    files, package = ascend.device_files(), ascend.torch_npu_version()
    smi, chips = ascend.npu_smi()
    cann, driver = ascend.cann_version(), ascend.driver_version()
    if not (files or package or smi or cann or driver):
        if wanted:
            yield problem("Ascend", "no Ascend NPU, driver, CANN or torch-npu here", "docs/ascend.md says how to begin")
        else:
            yield ok("Ascend", "no Ascend NPU here")
        return
    yield from check_devices(files, smi, chips)
    yield from check_versions(package, torch_version, cann, driver)
    if package is not None:
        yield from check_import()
    yield from check_variables(len(files) or None)


def check_devices(files: list[str], smi: str | None, chips: list[ascend.Chip]) -> Iterator[Finding]:
    """The NPUs' files, whether this user may open them, and their health."""
    if not files:
        yield problem("NPU", "there is no /dev/davinci0", f"install the driver and firmware; {_DOCKER}")
    else:
        folder = Path(files[0]).parent
        absent = [name for name in ascend.DEVICE_SERVICES if not (folder / name).exists()]
        closed = [file for file in files if not os.access(file, os.R_OK | os.W_OK)]
        if absent:
            yield problem("NPU", f"/dev has no {', '.join(absent)}", f"pass them on; {_DOCKER}")
        elif closed:
            yield problem(
                "NPU",
                f"this user may not open {closed[0]}",
                "add the user to the group of the device files (usermod -a -G HwHiAiUser USER) and log in again",
            )
        else:
            yield ok("NPU", f"{len(files)} device file(s)")
    if smi is None:
        yield warning("npu-smi", "not found", "mount or install /usr/local/bin/npu-smi with the driver's tools")
    elif not chips:
        yield problem(
            "npu-smi", smi.splitlines()[0] if smi else "no output", "the driver must work first: npu-smi info"
        )
    else:
        ill = [f"NPU {chip.npu} ({chip.name}): {chip.health}" for chip in chips if chip.health != "OK"]
        if ill:
            yield problem("npu-smi", "; ".join(ill), "npu-smi info -t health -i 0; the driver's log says what is wrong")
        else:
            yield ok("npu-smi", ", ".join(f"NPU {chip.npu}: {chip.name}" for chip in chips))
    if any("310P" in chip.name for chip in chips):
        yield ok("310P", "needs --dtype float16 and --enforce-eager: nanovllm serve MODEL --device npu --dtype float16 "
                 "--enforce-eager")  # fmt: skip


def check_versions(
    package: str | None, torch_version: str | None, cann: str | None, driver: str | None
) -> Iterator[Finding]:
    """Whether torch-npu, torch, CANN and the driver go together (``ascend_versions``)."""
    if package is None:
        yield problem("torch-npu", "not installed", INSTALL)
    elif package == "unknown":
        yield warning("torch-npu", "a package without a version", INSTALL)
    else:
        yield from _check_package(package, torch_version, cann)
    if cann is None:
        yield problem(
            "CANN",
            "not found: ASCEND_HOME_PATH is not set and there is no toolkit in /usr/local/Ascend",
            f"install CANN {RELEASES[0].cann} (toolkit, ops of your chip, NNAL), then source "
            f"{ascend.set_env_script()[0]}",
        )
    else:
        yield ok("CANN", cann)
    yield from _check_driver(cann, driver)


def _check_package(package: str, torch_version: str | None, cann: str | None) -> Iterator[Finding]:
    wanted = torch_of(package)
    if torch_version is not None and numbers(torch_version)[:3] != numbers(wanted):
        yield problem(
            "torch-npu",
            f"torch-npu {package} is for torch {wanted}, but torch {torch_version} is installed",
            f"pip install torch=={wanted}, or a torch-npu for this torch"
            + "".join(f": pip install torch-npu=={match}" for match in _packages_for(torch_version)[:1]),
        )
        return
    release = release_of(package)
    if release is None:
        yield warning(
            "torch-npu",
            f"torch-npu {package} is not in this version's table, so whether CANN fits is not known",
            "see TorchNPU's release notes at gitcode.com/Ascend/pytorch",
        )
    elif cann is not None and series(cann) not in release.works_with:
        older = numbers(cann)[:2] < numbers(release.works_with[0])
        remedy = f"install CANN {release.cann}, or a torch-npu that was released with CANN {series(cann)}"
        what = (
            f"torch-npu {package} is for CANN {release.cann} (compatible: {', '.join(release.works_with)}), not {cann}"
        )
        yield problem("torch-npu", what, remedy) if older else warning("torch-npu", what, remedy)
    else:
        yield ok("torch-npu", f"{package}, for torch {wanted} and CANN {release.cann}")


def _packages_for(torch_version: str) -> list[str]:
    """The versions of torch-npu for a torch, newest first."""
    wanted = numbers(torch_version)[:3]
    return [package for release in RELEASES for package in release.packages if numbers(torch_of(package)) == wanted]


def _check_driver(cann: str | None, driver: str | None) -> Iterator[Finding]:
    if driver is None:
        yield warning(
            "driver",
            "its version cannot be read",
            "install the driver (Ascend HDK); in Docker: -v /usr/local/Ascend/driver:/usr/local/Ascend/driver:ro",
        )
        return
    oldest = OLDEST_DRIVER.get(series(cann)) if cann is not None else None
    if oldest is not None and numbers(driver)[:2] < numbers(oldest):
        yield problem(
            "driver",
            f"Ascend HDK {driver} is older than {oldest}, the oldest named for CANN {cann}",
            f"install Ascend HDK {oldest} or newer on the host (driver, then firmware), or an older CANN",
        )
    else:
        yield ok("driver", f"Ascend HDK {driver}")


def check_import() -> Iterator[Finding]:
    """Whether torch-npu can be loaded and finds an NPU, asked of another Python."""
    answer = probes.ask(probes.NPU)
    if answer.value is not None:
        devices = answer.value["devices"]
        if devices:
            yield ok("import torch_npu", ", ".join(devices))
        else:
            yield problem(
                "import torch_npu",
                "torch-npu is loaded, but sees no NPU",
                f"npu-smi info must list one, and ASCEND_RT_VISIBLE_DEVICES must not hide it; {_DOCKER}",
            )
        return
    named = probes.missing_libraries(answer.log)
    missing = list(dict.fromkeys([*named, *(ascend.missing_libraries() if named else [])]))
    if missing:
        remedies = [_remedy_for(library) for library in missing]
        for remedy in dict.fromkeys(remedies):
            names = [library for library, its in zip(missing, remedies, strict=True) if its == remedy]
            yield problem("import torch_npu", f"{', '.join(names)}: not found", remedy)
    elif "undefined symbol" in answer.log:
        yield problem("import torch_npu", answer.failure, f"the versions above do not go together; {INSTALL}")
    else:
        yield problem("import torch_npu", answer.failure, "the findings above, from the first; then this command again")


def _remedy_for(library: str) -> str:
    if library.startswith(("libascend_hal", "libdcmi", "libdrv")):
        return "the driver's: export LD_LIBRARY_PATH=/usr/local/Ascend/driver/lib64/driver:$LD_LIBRARY_PATH"
    script, there = ascend.set_env_script(library)
    if there:
        return f"source {script}"
    part = "NNAL" if library.startswith("libatb") else "the CANN toolkit"
    return f"install {part} {RELEASES[0].cann}, then source {script}"


def check_variables(devices: int | None) -> Iterator[Finding]:
    """Environment variables that decide what an NPU does; ``devices`` is how many there are, None if not known."""
    home = os.environ.get("ASCEND_HOME_PATH")
    if home is None:
        script, there = ascend.set_env_script()
        if there:
            yield warning("ASCEND_HOME_PATH", "not set, but a toolkit is installed", f"source {script}")
    elif not Path(home).is_dir():
        yield problem("ASCEND_HOME_PATH", f"{home}: no such folder", f"source {ascend.set_env_script()[0]}")
    yield from _check_visible(os.environ.get("ASCEND_RT_VISIBLE_DEVICES"), devices)
    if os.environ.get("TASK_QUEUE_ENABLE") == "2":
        yield warning("TASK_QUEUE_ENABLE", "2 does not go with graphs", "unset it, or start with --enforce-eager")
    if os.environ.get("ASCEND_LAUNCH_BLOCKING") == "1":
        remedy = "unset ASCEND_LAUNCH_BLOCKING; or start with --enforce-eager"
        yield warning("ASCEND_LAUNCH_BLOCKING", "every launch waits for the NPU: slow, and graphs fail", remedy)
    if os.environ.get("NANOVLLM_ASCEND_FUSED") == "1" and not _has_triton_ascend():
        remedy = "pip uninstall triton, pip install triton-ascend; or unset NANOVLLM_ASCEND_FUSED"
        yield warning("NANOVLLM_ASCEND_FUSED", "needs triton-ascend, so torch_npu's operators are used", remedy)
    allocator = os.environ.get("PYTORCH_NPU_ALLOC_CONF", "")
    if "pin_memory_expandable_segments:true" in allocator.replace(" ", "").lower():
        remedy = "use expandable_segments:True alone, or start with --enforce-eager"
        yield warning("PYTORCH_NPU_ALLOC_CONF", "pin_memory_expandable_segments does not go with graphs", remedy)
    set_ones = [f"{name}={os.environ[name]}" for name in ascend.VARIABLES if name in os.environ]
    yield ok("environment", "; ".join(set_ones) or "none of the variables that matter is set")


def _has_triton_ascend() -> bool:
    try:
        return bool(metadata.version("triton-ascend"))
    except metadata.PackageNotFoundError:
        return False


def _check_visible(value: str | None, devices: int | None) -> Iterator[Finding]:
    name = "ASCEND_RT_VISIBLE_DEVICES"
    if value is None:
        return
    words = [word.strip() for word in value.split(",")]
    if not value.strip() or not all(word.isdecimal() for word in words):
        yield problem(name, f"{value!r} is no list of numbers", f"export {name}=0, or 0,1 for two NPUs; or unset it")
    elif len(set(words)) < len(words):
        yield problem(name, f"{value!r} names an NPU twice", f"export {name}={','.join(dict.fromkeys(words))}")
    elif devices is not None and (beyond := [word for word in words if int(word) >= devices]):
        yield problem(name, f"there is no NPU {beyond[0]}", f"choose from 0 to {devices - 1}, or unset {name}")
