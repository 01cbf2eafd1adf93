"""Which torch-npu, torch, CANN and driver go together.

From the release notes of TorchNPU (7.0.0 to 26.2.0) and of CANN (8.2.RC1 to 9.2.0) at gitcode.com, as of November 2026.
A torch-npu package is for one torch: the numbers before ".post" are torch's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

OLDEST_TORCH = (2, 11)  # pyproject.toml
INSTALL = "pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu && pip install torch-npu==2.13.0"


@dataclass(frozen=True)
class Release:
    """A release of torch-npu.

    Attributes:
        name: Huawei's own number for it.
        packages: the versions on PyPI, one for each torch.
        cann: the CANN it was released with.
        works_with: first two numbers of every CANN it is said to be compatible with, oldest first.
    """

    name: str
    packages: tuple[str, ...]
    cann: str
    works_with: tuple[str, ...]


_SINCE_8_5 = ("8.5", "9.0", "9.1", "9.2")

RELEASES = (
    Release(
        "26.2.0",
        ("2.14.0", "2.13.0", "2.12.0.post3", "2.11.0.post3", "2.10.0.post7", "2.9.0.post9", "2.7.1.post11"),
        "9.2.0",
        _SINCE_8_5,
    ),
    Release(
        "26.1.1",
        ("2.12.0.post2", "2.11.0.post2", "2.10.0.post6", "2.9.0.post8", "2.7.1.post10"),
        "9.1.1",
        _SINCE_8_5,
    ),
    Release("26.1.0", ("2.12.0", "2.11.0", "2.10.0.post4"), "9.1.0", _SINCE_8_5),
    Release("26.0.0", ("2.10.0", "2.9.0.post2", "2.8.0.post4", "2.7.1.post4"), "9.0.0", _SINCE_8_5),
    Release("7.3.0", ("2.9.0", "2.8.0.post2", "2.7.1.post2", "2.6.0.post5"), "8.5.0", _SINCE_8_5),
    Release("7.2.0", ("2.8.0", "2.7.1", "2.6.0.post3", "2.1.0.post17"), "8.3.RC1", ("8.3",)),
    Release("7.1.0", ("2.6.0", "2.5.1.post1", "2.1.0.post13"), "8.2.RC1", ("8.2",)),
    Release("7.0.0", ("2.5.1", "2.4.0.post4", "2.3.1.post6"), "8.1.RC1", ("8.1",)),
)

# First two numbers of a CANN -> those of the oldest driver (Ascend HDK) its notes name or its makers tested it with.
OLDEST_DRIVER = {
    "9.2": "25.0",
    "9.1": "25.5",
    "9.0": "25.5",
    "8.5": "25.5",
    "8.2": "25.2",
}


def release_of(package: str) -> Release | None:
    """The release that the torch-npu ``package`` (a version) belongs to; None if it is not known here."""
    version = package.partition("+")[0]
    return next((release for release in RELEASES if version in release.packages), None)


def torch_of(package: str) -> str:
    """The torch that the torch-npu ``package`` is for: "2.12.0.post3" is for "2.12.0"."""
    return ".".join(map(str, numbers(package)[:3]))


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (8, 3) for "8.3.RC1", (2, 13, 0) for "2.13.0+cpu"."""
    match = re.match(r"\d+(?:\.\d+)*(?!\w)", version.strip())
    return tuple(map(int, match[0].split("."))) if match else ()


def series(version: str) -> str:
    """The first two numbers of a version: "8.3" for "8.3.RC1"."""
    return ".".join(map(str, numbers(version)[:2]))
