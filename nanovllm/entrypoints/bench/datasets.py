"""Requests to measure with: random tokens, or conversations of a ShareGPT file. A seed always gives the same ones."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.errors import ParameterError

if TYPE_CHECKING:
    from nanovllm.config import ModelConfig
    from nanovllm.engine.tokenizer import Tokenizer
    from nanovllm.inputs import PromptType

# Which conversations of ShareGPT count, in tokens; the bounds are those of vLLM's benchmark.
MIN_LEN = 4
MAX_PROMPT_LEN = 1024
MAX_TOTAL_LEN = 2048

_REPAIRS = 10  # attempts to give a random text as many tokens as it is to have


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One request of a benchmark.

    Attributes:
        prompt: text, or token ids.
        prompt_len: tokens of the prompt.
        expected_output_len: tokens to generate.
    """

    prompt: PromptType
    prompt_len: int
    expected_output_len: int


def plain_token_ids(model: ModelConfig, tokenizer: Tokenizer | None) -> Sequence[int]:
    """Ids that stand for text: those the tokenizer and the model both know, without special ones.

    Raises:
        ParameterError: there are none.
    """
    special = set(model.eos_token_ids)
    num_ids = model.vocab_size
    if tokenizer is not None:
        special.update(tokenizer.all_special_ids)
        num_ids = min(num_ids, len(tokenizer))  # the model's vocabulary may be padded
    else:
        given = [model.hf_config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")]
        special.update(token_id for token_id in given if isinstance(token_id, int))
    ids = [token_id for token_id in range(num_ids) if token_id not in special]
    if not ids:
        raise ParameterError("the vocabulary has only special tokens", "model", model.model)
    return ids


def text_token_ids(tokenizer: Tokenizer) -> Sequence[int]:
    """`plain_token_ids` where there is no model at hand, only its tokenizer.

    Raises:
        ParameterError: there are none.
    """
    special = set(tokenizer.all_special_ids)
    ids = [token_id for token_id in range(len(tokenizer)) if token_id not in special]
    if not ids:
        raise ParameterError("the vocabulary has only special tokens", "tokenizer")
    return ids


def as_text(
    requests: Sequence[SampleRequest], tokenizer: Tokenizer, token_ids: Sequence[int], seed: int = 0
) -> list[SampleRequest]:
    """Requests of random tokens as text, for endpoints that take no ids.

    The text of random tokens is often split into other tokens than it was made of. It is cut or lengthened until it has
    as many as it was to have, or nearly so; ``prompt_len`` is then what it has.

    Args:
        token_ids: what tokens are drawn from.
    """
    draw = random.Random(seed)
    result = []
    for request in requests:
        wanted = request.prompt_len
        prompt: Any = request.prompt  # a TokensPrompt
        text = tokenizer.decode(prompt["prompt_token_ids"])
        for _ in range(_REPAIRS):
            ids = tokenizer.encode(text)
            if len(ids) == wanted:
                break
            if len(ids) < wanted:
                ids = ids + draw.choices(token_ids, k=wanted - len(ids))
            text = tokenizer.decode(ids[:wanted])
        result.append(SampleRequest(text, len(tokenizer.encode(text)), request.expected_output_len))
    return result


def random_requests(
    token_ids: Sequence[int],
    num_requests: int,
    input_len: int,
    output_len: int,
    *,
    prefix_len: int = 0,
    range_ratio: float = 0.0,
    seed: int = 0,
) -> list[SampleRequest]:
    """Prompts of random tokens.

    Args:
        token_ids: what tokens are drawn from.
        input_len: tokens of a prompt after the common prefix.
        output_len: tokens to generate.
        prefix_len: tokens that all prompts begin with.
        range_ratio: r draws both lengths from [length (1 - r), length (1 + r)] instead.

    Raises:
        ParameterError: a length or ratio out of range.
    """
    for name, value, least in (
        ("input_len", input_len, 1),
        ("output_len", output_len, 1),
        ("prefix_len", prefix_len, 0),
    ):
        if value < least:
            raise ParameterError(f"must be at least {least}", name, value)
    if not 0.0 <= range_ratio < 1.0:
        raise ParameterError("must be in [0, 1)", "range_ratio", range_ratio)
    draw = random.Random(seed)

    def length(middle: int) -> int:
        spread = int(middle * range_ratio)
        return max(1, draw.randint(middle - spread, middle + spread))

    prefix = draw.choices(token_ids, k=prefix_len)
    requests = []
    for _ in range(num_requests):
        ids = prefix + draw.choices(token_ids, k=length(input_len))
        requests.append(SampleRequest({"prompt_token_ids": ids}, len(ids), length(output_len)))
    return requests


def sharegpt_requests(
    file: str, tokenizer: Tokenizer | None, num_requests: int, output_len: int | None = None, *, seed: int = 0
) -> list[SampleRequest]:
    """First questions of ShareGPT conversations, in random order; repeated at random if there are too few.

    Args:
        file: JSON; a list of ``{"conversations": [{"value": question}, {"value": answer}, ...]}``.
        output_len: tokens to generate; None takes the length of the answer in the file.

    Raises:
        ParameterError: no tokenizer, a file that cannot be read, or no conversation of a fitting length in it.
    """
    if tokenizer is None:
        raise ParameterError("a ShareGPT file needs a tokenizer, and skip_tokenizer_init is set", "dataset_path", file)
    draw = random.Random(seed)
    turns = _sharegpt_turns(file)
    draw.shuffle(turns)
    requests: list[SampleRequest] = []
    for question, answer in turns:
        if len(requests) == num_requests:
            break
        prompt_len = len(tokenizer.encode(question))
        answer_len = len(tokenizer.encode(answer, add_special_tokens=False)) if output_len is None else output_len
        long_enough = prompt_len >= MIN_LEN and (output_len is not None or answer_len >= MIN_LEN)
        if long_enough and prompt_len <= MAX_PROMPT_LEN and prompt_len + answer_len <= MAX_TOTAL_LEN:
            requests.append(SampleRequest(question, prompt_len, answer_len))
    if not requests:
        raise ParameterError(f"no conversation of {MIN_LEN} to {MAX_TOTAL_LEN} tokens in it", "dataset_path", file)
    return requests + draw.choices(requests, k=num_requests - len(requests))


def _sharegpt_turns(file: str) -> list[tuple[str, str]]:
    """(question, answer) of every conversation that has both."""
    try:
        conversations: Any = json.loads(Path(file).read_text(encoding="utf-8"))
        return [
            (str(entry["conversations"][0]["value"]), str(entry["conversations"][1]["value"]))
            for entry in conversations
            if len(entry.get("conversations", ())) >= 2
        ]
    except OSError as error:
        raise ParameterError(f"cannot be read: {error.strerror}", "dataset_path", file) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ParameterError("not a ShareGPT file: a JSON list of conversations", "dataset_path", file) from error
