"""Parts of a command in processes of their own, each with a limit of time.

A GPU whose context is broken (an illegal access) or that hangs takes every later call of its process along. So the
command's own process never touches the device: it forks one for each part, which costs no imports, and ends those that
take too long, with whatever they have started.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
from gpu_engine import Setup

from nanovllm.platforms.cuda_driver import visible_gpus

Part = Callable[[Setup], dict[str, Any]]
_LEAST = 3.0  # seconds a part is worth beginning for


class PartError(Exception):
    """A part that failed in its own process, which has told why."""


class Isolated:
    """Calls parts, each in a process forked from this one.

    Args:
        limits: seconds a part may take, by name.
        seconds: that all parts together may take.
    """

    def __init__(self, limits: Mapping[str, float], seconds: float) -> None:
        self._limits = limits
        self._deadline = time.monotonic() + seconds

    def __call__(self, name: str, part: Part, setup: Setup) -> dict[str, Any]:
        """The part's result.

        Raises:
            PartError: it raised, its process died, or its time ran out.
        """
        if torch.cuda.is_initialized() or (visible_gpus.cache_info().currsize and visible_gpus()):
            raise RuntimeError("a process that has begun to use the GPU cannot be forked any more")
        limit = min(self._limits[name], self._deadline - time.monotonic())
        if limit < _LEAST:
            raise PartError("not begun: the command's time is spent (--seconds gives more)")
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=_work, args=(theirs, part, setup))
        process.start()
        theirs.close()
        try:
            if not ours.poll(limit):
                raise PartError(f"ended after {limit:.0f} s")
            result, error = ours.recv()
        except EOFError:
            process.join()
            raise PartError(f"its process died with {_told(process.exitcode)}") from None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid or 0, signal.SIGKILL)  # what it has started, too
            process.join()
            ours.close()
        if error is not None:
            raise PartError(error)
        return dict(result)


def _work(connection: Connection, part: Part, setup: Setup) -> None:
    os.setsid()
    try:
        connection.send((part(setup), None))
    except Exception as error:
        traceback.print_exc()
        connection.send((None, f"{type(error).__name__}: {error}"[:4000]))
    finally:
        connection.close()


def _told(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return signal.Signals(-exit_code).name
    return f"exit code {exit_code}"
