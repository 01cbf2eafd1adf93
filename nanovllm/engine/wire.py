"""Commands and messages of the engine as bytes: a JSON head, and behind it the arrays it speaks of.

    | length of head, 4 bytes | head | arrays, one after the other |

The outputs of a step are columns, so that a step of hundreds of requests is a few C calls. No pickle: whatever the
bytes say, only plain data comes out.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nanovllm.engine.messages import Add, Command, Died, Finish, Inspect, Message, Ready, ResetPrefixCache, Update, View
from nanovllm.engine.plain import from_plain, to_plain
from nanovllm.engine.plan import EngineOutput, TokenLogprobs
from nanovllm.engine.stats import StepStats
from nanovllm.errors import EngineDeadError, EngineGenerateError, ModelError, ParameterError

Array = np.ndarray[Any, Any]

_HEAD = struct.Struct("<I")
_to_json = json.JSONEncoder(separators=(",", ":")).encode
_from_json = json.JSONDecoder().decode
_COMMANDS: dict[str, type[Any]] = {"add": Add, "finish": Finish, "reset": ResetPrefixCache, "inspect": Inspect}
_NAMES = {cls: name for name, cls in _COMMANDS.items()}
_UPDATE = frozenset({"ids", "tokens", "cached", "rare", "stats", "refused", "replies", "arrays"})
_USER_ERRORS: dict[str, type[Exception]] = {cls.__name__: cls for cls in (ParameterError, ModelError)}


class WireError(ValueError):
    """Bytes that are no command or message of ours."""


# -- commands --------------------------------------------------------------------------------------------------------


def encode_command(command: Command) -> bytes:
    """A command as a frame."""
    arrays = []
    if isinstance(command, Add):  # the engine has no use for the text, and tokens are many
        arrays.append(np.frombuffer(array("i", command.input.prompt_token_ids), np.int32))
        bare = dataclasses.replace(command.input, prompt=None, prompt_token_ids=[])
        command = dataclasses.replace(command, input=bare)
    return _pack({_NAMES[type(command)]: to_plain(command)}, arrays)


def decode_command(frame: bytes) -> Command:
    """Raises WireError."""
    try:
        head, arrays = _unpack(frame)
        head.pop("arrays", None)
        ((name, plain),) = head.items()
        command: Command = from_plain(_COMMANDS[name], plain)
        if isinstance(command, Add):
            command.input.prompt_token_ids = arrays[0].tolist()
        return command
    except (ValueError, TypeError, LookupError, AttributeError, StopIteration, struct.error) as error:
        raise WireError(f"not a command: {error!r}") from error


# -- messages --------------------------------------------------------------------------------------------------------


def encode_message(message: Message) -> bytes:
    """A message as a frame."""
    if isinstance(message, Update):
        return _encode_update(message)
    if isinstance(message, View):
        return _pack({"view": True}, [np.frombuffer(message.frame, np.uint8)])
    if isinstance(message, Ready):
        return _pack({"ready": [message.max_model_len, message.num_blocks]})
    return _pack({"died": _encode_error(message.error)})


def decode_message(frame: bytes) -> Message:
    """Raises WireError."""
    try:
        head, arrays = _unpack(frame)
        if "died" in head:
            return Died(_decode_error(head["died"]))
        if "ready" in head:
            return Ready(*head["ready"])
        if "view" in head:
            return View(arrays[0].tobytes())
        if not _UPDATE.issuperset(head):
            raise WireError(f"unknown keys in {list(head)}")
        return _decode_update(head, arrays)
    except (ValueError, TypeError, LookupError, AttributeError, StopIteration, struct.error) as error:
        raise WireError(f"not a message: {error!r}") from error


def _encode_update(update: Update) -> bytes:
    outputs = update.outputs
    head: dict[str, Any] = {}
    arrays: list[Array] = []
    if outputs:
        head["ids"] = [output.request_id for output in outputs]
        head["tokens"] = [new[0] if len(new := output.new_token_ids) == 1 else new for output in outputs]
        head["cached"] = [output.num_cached_tokens for output in outputs]
        positions: list[TokenLogprobs] = []
        rare = [(index, extra) for index, output in enumerate(outputs) if (extra := _encode_rare(output, positions))]
        if rare:
            head["rare"] = rare
            arrays += [output.pooled for output in outputs if output.pooled is not None]
        if positions:
            arrays.append(np.concatenate([position.token_ids for position in positions]))
            arrays.append(np.concatenate([position.logprobs for position in positions]))
    if update.stats is not None:
        head["stats"] = to_plain(update.stats)
    if update.refused:
        head["refused"] = [(request_id, _encode_error(error)) for request_id, error in update.refused]
    if update.replies:
        head["replies"] = update.replies
    return _pack(head, arrays)


def _decode_update(head: dict[str, Any], arrays: list[Array]) -> Update:
    outputs: list[EngineOutput] = []
    if "ids" in head:
        outputs = [
            EngineOutput(request_id, new if isinstance(new, list) else [new], num_cached_tokens=cached)
            for request_id, new, cached in zip(head["ids"], head["tokens"], head["cached"], strict=True)
        ]
        _decode_rare(outputs, head.get("rare", ()), arrays)
    return Update(
        outputs,
        from_plain(StepStats, head["stats"]) if "stats" in head else None,
        [(request_id, _decode_error(error)) for request_id, error in head.get("refused", ())],
        [(number, result) for number, result in head.get("replies", ())],
    )


def _encode_rare(output: EngineOutput, positions: list[TokenLogprobs]) -> dict[str, Any]:
    """What most outputs lack: the end, a vector, log-probabilities, whose arrays are left in ``positions``."""
    rare: dict[str, Any] = {}
    if output.finish_reason is not None:
        rare["finish"], rare["stop"] = output.finish_reason, output.stop_reason
    if output.pooled is not None:
        rare["pooled"] = True
    if output.logprobs is not None:
        rare["logprobs"] = [(int(position.rank), len(position.token_ids)) for position in output.logprobs]
        positions += output.logprobs
    if output.prompt_logprobs is not None:
        rare["prompt"] = [(int(position.rank), len(position.token_ids)) for position in output.prompt_logprobs]
        positions += output.prompt_logprobs
    return rare


def _decode_rare(outputs: list[EngineOutput], rare: Iterable[tuple[int, dict[str, Any]]], arrays: list[Array]) -> None:
    """Arrays are in the order of encoding: vectors, then the tokens and values of all positions."""
    vectors, start = iter(arrays), 0

    def take(shapes: list[tuple[int, int]]) -> list[TokenLogprobs]:
        nonlocal start
        positions = []
        for rank, length in shapes:
            end = start + length
            positions.append(TokenLogprobs(arrays[-2][start:end], arrays[-1][start:end], rank))
            start = end
        return positions

    for index, extra in rare:
        output = outputs[index]
        output.finish_reason, output.stop_reason = extra.get("finish"), extra.get("stop")
        if "pooled" in extra:
            output.pooled = next(vectors)
        if "logprobs" in extra:
            output.logprobs = take(extra["logprobs"])
        if "prompt" in extra:
            output.prompt_logprobs = take(extra["prompt"])


# -- errors ----------------------------------------------------------------------------------------------------------


def _encode_error(error: BaseException) -> dict[str, Any]:
    plain: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, ParameterError):
        value = error.value
        simple = value is None or isinstance(value, (bool, int, float, str))
        plain |= {"parameter": error.parameter, "value": value if simple else repr(value)}
    return plain


def _decode_error(plain: dict[str, Any]) -> Exception:
    """Errors of the user as what they were; any other as an `EngineGenerateError` that names its type."""
    name, message = plain["type"], plain["message"]
    if name in (EngineGenerateError.__name__, EngineDeadError.__name__):
        return EngineGenerateError(message)
    error = _USER_ERRORS[name](message) if name in _USER_ERRORS else EngineGenerateError(f"{name}: {message}")
    if isinstance(error, ParameterError):
        error.parameter, error.value = plain["parameter"], plain["value"]
    return error


# -- frames ----------------------------------------------------------------------------------------------------------


def _pack(head: dict[str, Any], arrays: Sequence[Array] = ()) -> bytes:
    if arrays:
        head["arrays"] = [(each.dtype.str, len(each)) for each in arrays]
    text = _to_json(head).encode()
    return b"".join([_HEAD.pack(len(text)), text, *(each.tobytes() for each in arrays)])


def _unpack(frame: bytes) -> tuple[dict[str, Any], list[Array]]:
    (length,) = _HEAD.unpack_from(frame)
    start = _HEAD.size + length
    head = _from_json(frame[_HEAD.size : start].decode())
    if not isinstance(head, dict):
        raise WireError("the head is no object")
    arrays = []
    for name, count in head.get("arrays", ()):
        if name not in ("<i8", "<i4", "<f4", "|u1"):
            raise WireError(f"no array of type {name}")
        arrays.append(np.frombuffer(frame, name, count, start))
        start += arrays[-1].nbytes
    return head, arrays
