"""What files, the environment and programs tell of an Ascend installation; nothing of it is loaded."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path("/")  # tests look elsewhere
DEVICE_SERVICES = (
    "davinci_manager",
    "devmm_svm",
    "hisi_hdc",
)  # what a process needs of /dev beside the NPU
VARIABLES = (
    "ASCEND_HOME_PATH", "ATB_HOME_PATH", "LD_LIBRARY_PATH", "ASCEND_RT_VISIBLE_DEVICES", "PYTORCH_NPU_ALLOC_CONF",
    "TASK_QUEUE_ENABLE", "ASCEND_LAUNCH_BLOCKING", "TORCH_DEVICE_BACKEND_AUTOLOAD",
)  # fmt: skip

_TOOLKITS = ("usr/local/Ascend/ascend-toolkit", "usr/local/Ascend/cann")
_NNAL = "usr/local/Ascend/nnal/atb"


@dataclass(frozen=True)
class Chip:
    """A row of npu-smi's table.

    Attributes:
        npu: the card's number.
        name: such as "910B3" or "310P3".
        health: "OK", or what is wrong.
    """

    npu: int
    name: str
    health: str


def device_files() -> list[str]:
    """The NPUs' files in /dev, by number."""
    found = [path for path in (ROOT / "dev").glob("davinci*") if re.fullmatch(r"davinci\d+", path.name)]
    return [str(path) for path in sorted(found, key=lambda path: int(path.name[7:]))]


def torch_npu_version() -> str | None:
    """The installed torch-npu's version; "unknown" if there is a folder without a description; None if nothing."""
    try:
        return metadata.version("torch_npu")
    except metadata.PackageNotFoundError:
        return None if importlib.util.find_spec("torch_npu") is None else "unknown"


def set_env_script(library: str = "") -> tuple[str, bool]:
    """The script that puts ``library`` on the path, and whether it is there: the toolkit's, or NNAL's for libatb.so."""
    folders = (_NNAL,) if library.startswith("libatb") else _TOOLKITS
    scripts = [ROOT / folder / "set_env.sh" for folder in folders]
    home = os.environ.get("ASCEND_HOME_PATH")
    if home and not library.startswith("libatb"):
        scripts = [Path(home) / "set_env.sh", Path(home).parent / "set_env.sh", *scripts]
    found = next((script for script in scripts if script.is_file()), None)
    return (str(found), True) if found else (f"/{folders[0]}/set_env.sh", False)


def cann_version() -> str | None:
    """The version of the toolkit at ``ASCEND_HOME_PATH`` (or where it is installed by default)."""
    home = os.environ.get("ASCEND_HOME_PATH")
    folders = [Path(home)] if home else [ROOT / _TOOLKITS[0] / "latest", ROOT / _TOOLKITS[1]]
    for folder in folders:
        infos = (*folder.glob("*/ascend_*_install.info"), *folder.glob("*/version.info"), folder / "version.cfg")
        for file in infos:
            if version := _field(file, "version"):
                return version
        if match := re.search(r"\d+\.\d+\.\w+", folder.resolve().name):
            return match[0]
    return None


def driver_version() -> str | None:
    """The version of the driver (Ascend HDK) on this machine."""
    folder = _field(ROOT / "etc/ascend_install.info", "driver_install_path_param") or "/usr/local/Ascend"
    return _field(ROOT / folder.lstrip("/") / "driver/version.info", "version")


def _field(file: Path, name: str) -> str | None:
    """The value of the first line ``name=value`` of a file; names in any case, ``[7.0:8.3.RC1]`` is 8.3.RC1."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        key, equals, value = line.partition("=")
        if equals and key.strip().lower() in (name, f"toolkit_installed_{name}"):
            return value.strip().strip("[]").rpartition(":")[2] or None
    return None


def missing_libraries() -> list[str]:
    """Names of the shared libraries that torch-npu needs and the loader does not find, asked of ``ldd``.

    torch's own and torch-npu's are not counted: they are found once torch is loaded.
    """
    spec, ldd = importlib.util.find_spec("torch_npu"), shutil.which("ldd")
    if spec is None or spec.origin is None or ldd is None:
        return []
    folder = Path(spec.origin).parent
    files = sorted(folder.rglob("*.so"))
    torch = importlib.util.find_spec("torch")
    own = {file.name for file in files}
    if torch is not None and torch.origin is not None:
        own |= {file.name for file in (Path(torch.origin).parent / "lib").glob("*.so*")}
    missing: dict[str, None] = {}
    for file in files:
        done = subprocess.run([ldd, str(file)], capture_output=True, text=True, check=False)
        missing |= dict.fromkeys(re.findall(r"^\s*(\S+) => not found", done.stdout, re.MULTILINE))
    return [name for name in missing if name not in own and not name.startswith("libpython")]


def npu_smi() -> tuple[str | None, list[Chip]]:
    """What ``npu-smi info`` prints (None without the program; its message if it fails), and the chips in it."""
    program = shutil.which("npu-smi")
    if program is None:
        return None, []
    try:
        done = subprocess.run([program, "info"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"npu-smi failed: {error}", []
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        return f"npu-smi failed with exit code {done.returncode}: {lines[-1]}", []
    rows = re.findall(r"^\|\s*(\d+)\s+(\w+)\s*\|\s*([A-Za-z]+)\s*\|", done.stdout, re.MULTILINE)
    return done.stdout, [Chip(int(npu), name, health) for npu, name, health in rows]


def facts() -> dict[str, Any]:
    """All of the above, for a report."""
    text, chips = npu_smi()
    return {
        "device files": device_files(),
        "driver": driver_version(),
        "CANN": cann_version(),
        "toolkit": os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME"),
        "NNAL": os.environ.get("ATB_HOME_PATH"),
        "npu-smi": [f"{chip.npu}: {chip.name}, {chip.health}" for chip in chips] if chips else text,
        "missing libraries": missing_libraries(),
    }
