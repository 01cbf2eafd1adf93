"""Reading one call: what all formats share."""

from __future__ import annotations

import json
from collections.abc import Container

from nanovllm.parsers.emitter import Emitter
from nanovllm.parsers.json_text import copy_json, read_json
from nanovllm.parsers.source import Malformed, Source, Steps, Unfinished


def attempt(source: Source, emit: Emitter, call: Steps[None], start: int | None = None) -> Steps[bool]:
    """Run ``call``, which reads one call; text that turns out to be none is content. True if a call stands.

    ``start`` is the position the call's text begins at, by default the present one; it must be marked. Arguments that
    the end of the text cuts off stand as they are: the finish reason says that they are not whole. For what is wrong
    in the middle see `AnswerParser`.
    """
    begin = source.mark() if start is None else start
    emit.begin_call()
    try:
        yield from call
    except Malformed:
        if emit.take_back():
            emit.content(source.since(begin))
    except Unfinished:
        if not emit.call_started:
            emit.take_back()
            emit.content(source.since(begin))
    finally:
        source.release()
    if emit.call_started:
        emit.end_call()
    return emit.call_started


def read_json_call(
    source: Source, emit: Emitter, argument_keys: tuple[str, ...] = ("arguments",), names: Container[str] | None = None
) -> Steps[None]:
    """Read ``{"name": "f", "arguments": {...}}``; the arguments are handed on as they arrive.

    The call is announced when its arguments open, so that an object with a name and no arguments object is not taken
    for one. The keys may come in any order, and others are skipped; without arguments they are empty.

    Args:
        argument_keys: the names the format has for the arguments.
        names: the functions there are; None lets every name pass.

    Raises:
        Malformed, Unfinished: it is no call.
    """
    name = arguments = None
    yield from source.expect("{")
    yield from source.skip_space()
    while True:
        key = yield from _read_string(source)
        yield from source.skip_space()
        yield from source.expect(":")
        yield from source.skip_space()
        if key == "name" and name is None:
            name = yield from _read_string(source)
            if not name or not name.isprintable() or (names is not None and name not in names):
                raise Malformed
        elif key in argument_keys and arguments is None and not emit.call_started:
            if (yield from source.peek()) != "{":
                raise Malformed
            if name is None:
                arguments = yield from read_json(source)
            else:
                emit.call(name)
                yield from copy_json(source, emit.arguments)
        elif key == "name" or key in argument_keys:
            raise Malformed
        else:
            yield from read_json(source)
        yield from source.skip_space()
        if not (yield from source.accept(",")):
            break
        yield from source.skip_space()
    yield from source.expect("}")
    if name is None:
        raise Malformed
    if not emit.call_started:
        emit.call(name)
        emit.arguments(arguments or "{}")


def _read_string(source: Source) -> Steps[str]:
    if (yield from source.peek()) != '"':
        raise Malformed
    text: str = json.loads((yield from read_json(source)))
    return text
