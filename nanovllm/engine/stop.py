"""The stop rules of generation that look at tokens; stop strings are the detokenizer's."""

from __future__ import annotations

from nanovllm.engine.plan import EngineOutput
from nanovllm.engine.repetition import ends_in_repetition
from nanovllm.engine.request import Request


def check_stop(request: Request, token: int, output: EngineOutput) -> None:
    """Say in ``output`` why ``token``, the request's last, ends it, if it does.

    EOS, stop ids, length, repetition, in this order; nothing but length ends a request below min_tokens.
    """
    length = len(request.token_ids)
    if length >= request.min_total:
        if token in request.eos_token_ids:
            output.finish_reason = "stop"
            return
        if token in request.stop_token_ids:
            output.finish_reason, output.stop_reason = "stop", token
            return
    if length >= request.max_total:
        output.finish_reason = "length"
    elif (
        (detection := request.params.repetition_detection) is not None
        and length >= request.min_total
        and ends_in_repetition(request.token_ids, request.num_prompt_tokens, detection)
    ):
        output.finish_reason = "repetition"
