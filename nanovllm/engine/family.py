"""From a validated prompt to the requests that answer it: one, or ``n`` that share the prompt's blocks."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from nanovllm.engine.request import Request

if TYPE_CHECKING:
    from nanovllm.engine.input import EngineInput


def derive_seed(*parts: int | str) -> int:
    """64 bits that look independent for any two different argument lists."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def child_ids(request_id: str, count: int) -> list[str]:
    """The ids that a request's outputs have in the engine. No two users' ids give the same."""
    return [f"{index}_{request_id}" for index in range(count)]


def make_family(
    request_id: str,
    prompt: EngineInput,
    max_model_len: int,
    default_seed: int,
    tenant: str = "",
    weight: float = 1.0,
) -> list[Request]:
    """One request per output of the prompt, the first to compute the prompt for all.

    Args:
        default_seed: used if the parameters name none.
        tenant, weight: of all of them; see `Request`.
    """
    params = prompt.params
    seed = default_seed if params.seed is None else params.seed % 2**64
    family = []
    for index, child_id in enumerate(child_ids(request_id, params.n)):
        own = params
        if index > 0 and params.prompt_logprobs is not None:  # the first one's are everybody's
            own = params.clone()
            own.prompt_logprobs = own.prompt_logprob_token_ids = None
            own.skip_reading_prefix_cache = False
        family.append(
            Request(
                child_id,
                prompt.prompt_token_ids,
                own,
                max_model_len=max_model_len,
                stop_token_ids=prompt.stop_token_ids,
                eos_token_ids=prompt.eos_token_ids,
                bad_words_ids=prompt.bad_words_ids,
                guide=prompt.guide,
                pooling=None if prompt.pooling is None else prompt.pooling.method,
                seed=seed if index == 0 else derive_seed(seed, index),
                cache_salt=prompt.cache_salt,
                tenant=tenant,
                weight=weight,
            )
        )
    return family
