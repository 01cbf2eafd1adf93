"""Errors a user can cause or must know of. Everything a user can mend is a ``ValueError``."""

from __future__ import annotations

from typing import Any


class ParameterError(ValueError):
    """A parameter has a value the engine cannot honour.

    Attributes:
        parameter: name of the offending parameter.
        value: the value given.
    """

    def __init__(self, message: str, parameter: str | None = None, value: Any = None) -> None:
        self.parameter = parameter
        self.value = value
        if parameter is not None:
            message = f"{message} (parameter={parameter}, value={value!r})"
        super().__init__(message)


class ModelError(ValueError):
    """A model folder cannot be served: missing or malformed files, unknown architecture, wrong weights."""


class EngineDeadError(RuntimeError):
    """The engine met a fault it cannot recover from; make a new one."""


class EngineGenerateError(RuntimeError):
    """One request met a fault inside the engine; the engine goes on."""


class RequestTimeoutError(RuntimeError):
    """A request had not ended by its deadline, and was aborted."""


class StepError(RuntimeError):
    """A forward pass failed; its cause is attached. The requests in it have ended, the engine goes on."""
