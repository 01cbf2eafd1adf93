"""Dataclasses as JSON values and back, read by their type hints: nothing but declared fields is ever made of bytes."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """What ``json`` can write. Of a dataclass, the fields that differ from their defaults."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(item) for item in value] if set(map(type, value)) - {int, str} else list(value)
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    plain, cls = {}, type(value)
    for name, default in _defaults(cls):  # type: ignore[arg-type]  # a class is hashable
        item = getattr(value, name)
        if item is not default and item != default:
            plain[name] = to_plain(item)
    return plain


def from_plain(cls: type[T], plain: Any) -> T:
    """The dataclass that `to_plain` was given.

    Raises:
        TypeError, ValueError: the values do not fit the fields.
    """
    fields = _readers(cls)  # type: ignore[arg-type]
    return cls(**{name: fields[name](item) for name, item in plain.items()})


@cache
def _defaults(cls: type) -> list[tuple[str, Any]]:
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is no plain data")
    return [
        (f.name, f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default)
        for f in dataclasses.fields(cls)
    ]


@cache
def _readers(cls: type) -> dict[str, Callable[[Any], Any]]:
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is no plain data")
    names = vars(sys.modules[cls.__module__])  # annotations are text there (PEP 563)
    return {f.name: _reader(eval(str(f.type), names)) for f in dataclasses.fields(cls)}


def _reader(hint: Any) -> Callable[[Any], Any]:
    """How a value of this type is made of what ``json`` read."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _union_reader([kind for kind in arguments if kind is not NoneType])
    if origin in (list, set, frozenset) or (origin is tuple and arguments[-1] is Ellipsis):
        read = _reader(arguments[0])
        return origin if read is _as_is else lambda items: origin(map(read, items))
    if origin is tuple:
        readers = [_reader(kind) for kind in arguments]
        return lambda items: tuple(read(item) for read, item in zip(readers, items, strict=True))
    if origin is dict:
        key, read = arguments[0], _reader(arguments[1])
        return lambda items: {key(name): read(item) for name, item in items.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return lambda plain: from_plain(hint, plain)
    if isinstance(hint, type) and issubclass(hint, (Path, Enum)):
        return hint
    return _as_is


def _union_reader(kinds: list[Any]) -> Callable[[Any], Any]:
    """Of several types, at most one is written as a JSON object, one as an array; the others are as they are."""
    readers: dict[type, Callable[[Any], Any]] = {}
    other: Callable[[Any], Any] = _as_is
    for kind in kinds:
        origin = get_origin(kind)
        if origin in (list, tuple, set, frozenset):
            readers[list] = _reader(kind)
        elif origin is dict or dataclasses.is_dataclass(kind):
            readers[dict] = _reader(kind)
        elif isinstance(kind, type) and issubclass(kind, (Path, Enum)):
            other = kind

    def read(value: Any) -> Any:
        if value is None:
            return None
        return readers.get(type(value), other)(value)

    return read


def _as_is(value: Any) -> Any:
    return value
