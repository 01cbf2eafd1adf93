"""Commands and messages of the engine as bytes: a JSON head, and behind it the arrays it speaks of.

    | length of head, 4 bytes | head | arrays, one after the other |

The outputs of a step are columns, so that a step of hundreds of requests is a few C calls. No pickle: whatever the
bytes say, only plain data comes out.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanovllm.engine.messages import Add, Command, Died, Finish, Message, Ready, ResetPrefixCache, Update
from nanovllm.engine.plain import from_plain, to_plain
from nanovllm.engine.plan import EngineOutput, TokenLogprobs
from nanovllm.engine.stats import StepStats
from nanovllm.errors import EngineDeadError, EngineGenerateError, ModelError, ParameterError

Array = np.ndarray[Any, Any]

_HEAD = struct.Struct("<I")
_COMMANDS: dict[str, type[Any]] = {"add": Add, "finish": Finish, "reset": ResetPrefixCache}
_NAMES = {cls: name for name, cls in _COMMANDS.items()}
_USER_ERRORS: dict[str, type[Exception]] = {cls.__name__: cls for cls in (ParameterError, ModelError)}


class WireError(ValueError):
    """Bytes that are no command or message of ours."""


# -- commands --------------------------------------------------------------------------------------------------------


def encode_command(command: Command) -> bytes:
    """A command as a frame."""
    if isinstance(command, Add):  # the engine has no use for the text
        command = dataclasses.replace(command, input=dataclasses.replace(command.input, prompt=None))
    return _pack({_NAMES[type(command)]: to_plain(command)})


def decode_command(frame: bytes) -> Command:
    """Raises WireError."""
    try:
        ((name, plain),) = _unpack(frame)[0].items()
        command: Command = from_plain(_COMMANDS[name], plain)
        return command
    except (ValueError, TypeError, LookupError, struct.error) as error:
        raise WireError(f"not a command: {error!r}") from error


# -- messages --------------------------------------------------------------------------------------------------------


def encode_message(message: Message) -> bytes:
    """A message as a frame."""
    if isinstance(message, Update):
        return _encode_update(message)
    if isinstance(message, Ready):
        return _pack({"ready": message.max_model_len})
    return _pack({"died": _encode_error(message.error)})


def decode_message(frame: bytes) -> Message:
    """Raises WireError."""
    try:
        head, arrays = _unpack(frame)
        if "died" in head:
            return Died(_decode_error(head["died"]))
        return Ready(head["ready"]) if "ready" in head else _decode_update(head, arrays)
    except (ValueError, TypeError, LookupError, struct.error) as error:
        raise WireError(f"not a message: {error!r}") from error


def _encode_update(update: Update) -> bytes:
    outputs = update.outputs
    head: dict[str, Any] = {}
    arrays: list[Array] = []
    if outputs:
        head["ids"] = [output.request_id for output in outputs]
        head["tokens"] = [new[0] if len(new := output.new_token_ids) == 1 else new for output in outputs]
        head["cached"] = [output.num_cached_tokens for output in outputs]
        rare: list[tuple[int, dict[str, Any]]] = []
        for index, output in enumerate(outputs):
            if output.finish_reason is not None or output.logprobs is not None or output.prompt_logprobs is not None:
                rare.append((index, _encode_rare(output, arrays)))
        if rare:
            head["rare"] = rare
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
        for index, rare in head.get("rare", ()):
            output = outputs[index]
            output.finish_reason, output.stop_reason = rare.get("finish"), rare.get("stop")
            if "logprobs" in rare:
                output.logprobs = _decode_logprobs(rare["logprobs"], arrays)
            if "prompt" in rare:
                output.prompt_logprobs = _decode_logprobs(rare["prompt"], arrays)
    return Update(
        outputs,
        from_plain(StepStats, head["stats"]) if "stats" in head else None,
        [(request_id, _decode_error(error)) for request_id, error in head.get("refused", ())],
        [(number, result) for number, result in head.get("replies", ())],
    )


def _encode_rare(output: EngineOutput, arrays: list[Array]) -> dict[str, Any]:
    """What most outputs lack: the end, log-probabilities."""
    rare: dict[str, Any] = {}
    if output.finish_reason is not None:
        rare["finish"], rare["stop"] = output.finish_reason, output.stop_reason
    if output.logprobs is not None:
        rare["logprobs"] = _encode_logprobs(output.logprobs, arrays)
    if output.prompt_logprobs is not None:
        rare["prompt"] = _encode_logprobs(output.prompt_logprobs, arrays)
    return rare


def _encode_logprobs(positions: Sequence[TokenLogprobs], arrays: list[Array]) -> list[Any]:
    """[index of the first of two arrays, [rank, ...], [number of entries, ...]] of the positions."""
    if not positions:
        return [0, [], []]
    first = len(arrays)
    arrays.append(np.concatenate([position.token_ids for position in positions]))
    arrays.append(np.concatenate([position.logprobs for position in positions]))
    return [first, [int(position.rank) for position in positions], [len(position.token_ids) for position in positions]]


def _decode_logprobs(plain: list[Any], arrays: list[Array]) -> list[TokenLogprobs]:
    first, ranks, lengths = plain
    positions, start = [], 0
    for rank, length in zip(ranks, lengths, strict=True):
        end = start + length
        positions.append(TokenLogprobs(arrays[first][start:end], arrays[first + 1][start:end], rank))
        start = end
    return positions


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
        head["arrays"] = [(array.dtype.str, len(array)) for array in arrays]
    text = json.dumps(head, separators=(",", ":")).encode()
    return b"".join([_HEAD.pack(len(text)), text, *(array.tobytes() for array in arrays)])


def _unpack(frame: bytes) -> tuple[dict[str, Any], list[Array]]:
    (length,) = _HEAD.unpack_from(frame)
    start = _HEAD.size + length
    head = json.loads(frame[_HEAD.size : start])
    if not isinstance(head, dict):
        raise WireError("the head is no object")
    arrays = []
    for name, count in head.get("arrays", ()):
        if name not in ("<i8", "<i4", "<f4"):
            raise WireError(f"no array of type {name}")
        array = np.frombuffer(frame, name, count, start)
        start += array.nbytes
        arrays.append(array)
    return head, arrays
