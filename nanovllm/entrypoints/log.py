"""Where the engine's messages go: standard error, one line each, unless the application has set up logging itself."""

from __future__ import annotations

import logging
import os


def setup_logging(level: str | None = None) -> None:
    """Give the ``nanovllm`` logger a handler if nothing else handles it.

    Args:
        level: by default ``NANOVLLM_LOGGING_LEVEL``, then vLLM's variable, then INFO.
    """
    logger = logging.getLogger("nanovllm")
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(message)s", "%m-%d %H:%M:%S"))
    logger.addHandler(handler)
    name = level or os.environ.get("NANOVLLM_LOGGING_LEVEL") or os.environ.get("VLLM_LOGGING_LEVEL") or "INFO"
    logger.setLevel(name.upper())
