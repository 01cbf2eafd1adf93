"""Making the engine a command runs."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.entrypoints.llm import LLM


def load_llm(engine_args: dict[str, Any], verbose: bool = False) -> LLM:
    """An `LLM`, loaded quickly and quietly.

    Args:
        engine_args: keyword arguments of `LLM`.
        verbose: show the engine's messages; otherwise warnings only, unless the environment sets a level.

    Raises:
        ParameterError, ModelError: as `LLM`.
    """
    # Importing torch makes some 300,000 objects that live as long as the process. Not looking for garbage among them,
    # neither now nor at exit, saves a third of a second.
    gc.disable()
    try:
        from nanovllm.entrypoints.llm import LLM
        from nanovllm.entrypoints.log import setup_logging

        asked = verbose or os.environ.get("NANOVLLM_LOGGING_LEVEL") or os.environ.get("VLLM_LOGGING_LEVEL")
        setup_logging(None if asked else "WARNING")
        return LLM(**engine_args)
    finally:
        gc.freeze()
        gc.enable()
