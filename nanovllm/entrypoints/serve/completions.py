"""``/v1/completions``: text, token ids or several of either, streamed or not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any, cast

from fastapi import APIRouter, Request
from starlette.responses import Response

from nanovllm.entrypoints.serve.admission import Ticket, get_ticket
from nanovllm.entrypoints.serve.beam import beam_outputs
from nanovllm.entrypoints.serve.context import FINGERPRINT, ServeContext, get_context, make_request_id
from nanovllm.entrypoints.serve.generation import Streams, Usage, final_outputs, merged
from nanovllm.entrypoints.serve.logprobs import completion_logprobs, prompt_logprobs
from nanovllm.entrypoints.serve.prompts import completion_prompts, num_prompts
from nanovllm.entrypoints.serve.protocol.completions import CompletionRequest
from nanovllm.entrypoints.serve.protocol.errors import RESPONSES
from nanovllm.entrypoints.serve.sse import DONE, EventStream, answer_unless_gone, event, json_bytes, json_text
from nanovllm.inputs import PromptType
from nanovllm.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

router = APIRouter()


@router.post("/v1/completions", responses=RESPONSES, response_model=None)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Complete a prompt."""
    context = get_context(request)
    call = await _Call.make(context, body, make_request_id("cmpl", request, body.request_id), get_ticket(request))
    if body.stream:
        return EventStream(call.events(), request.url.path, context.args.sse_keep_alive_interval)
    return await answer_unless_gone(request, call.answer())


@dataclass
class _Call:
    """One request on its way."""

    context: ServeContext
    body: CompletionRequest
    ticket: Ticket
    priority: int
    call_id: str
    model: str
    prompts: list[PromptType]
    params: SamplingParams
    created: int
    usage: Usage

    @classmethod
    async def make(cls, context: ServeContext, body: CompletionRequest, call_id: str, ticket: Ticket) -> _Call:
        """Check a request and tokenise what must be.

        Raises:
            ParameterError: it cannot be honoured.
            ServeError: there is no such model, or no room.
        """
        model = context.model_name(body.model)
        context.warn_unknown(body.unknown_fields())
        context.check_priority(body.priority)
        priority = ticket.priority(body.priority)
        kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
        params = body.params(context.generation_defaults, output_kind=kind)
        ticket.expect(num_prompts(body) * params.n)
        prompts = await completion_prompts(context, body)
        context.log_request(call_id, body.prompt, params, {"user": body.user, "session_id": body.session_id})
        usage = Usage(with_details=context.args.enable_prompt_tokens_details)
        return cls(context, body, ticket, priority, call_id, model, prompts, params, int(time.time()), usage)

    @property
    def as_ids(self) -> bool:
        return self.context.names_tokens_by_id(self.body.return_tokens_as_token_ids)

    def streams(self) -> Streams:
        context, engine = self.context, self.context.engine
        options: dict[str, Any] = {"priority": self.priority, "caller": self.ticket}
        return [
            engine.generate(prompt, self.params, context.engine_id(self.call_id), **options) for prompt in self.prompts
        ]

    # -- one answer ----------------------------------------------------------------------------------------------

    async def answer(self) -> Response:
        """The whole answer, once everything has been generated."""
        choices = []
        for index, output in enumerate(await self._outputs()):
            self.usage.add_prompt(output)
            for completion in output.outputs:
                if not self.body.prompt_only:
                    self.usage.completion += len(completion.token_ids)
                choices.append(self._choice(output, completion, index * len(output.outputs) + completion.index))
        return Response(
            json_bytes(
                {
                    "id": self.call_id,
                    "object": "text_completion",
                    "created": self.created,
                    "model": self.model,
                    "choices": choices,
                    "service_tier": None,
                    "system_fingerprint": FINGERPRINT,
                    "usage": self.usage.as_json(),
                    "kv_transfer_params": None,
                }
            ),
            media_type="application/json",
        )

    async def _outputs(self) -> list[RequestOutput]:
        if self.body.use_beam_search:
            context, body = self.context, self.body
            return await beam_outputs(context, self.call_id, self.prompts, self.params, body, self.ticket)
        if self.body.prompt_only and self.params.prompt_logprobs is None:
            return [await asyncio.to_thread(self._prompt_as_output, prompt) for prompt in self.prompts]
        return await final_outputs(self.streams())

    def _prompt_as_output(self, prompt: PromptType) -> RequestOutput:
        """An answer for which the engine has nothing to do."""
        checked = self.context.engine.input.process(prompt, self.params)
        outputs = [CompletionOutput(index, "", [], finish_reason="length") for index in range(self.params.n)]
        return RequestOutput(self.call_id, checked.prompt, checked.prompt_token_ids, outputs=outputs, finished=True)

    def _choice(self, output: RequestOutput, completion: CompletionOutput, number: int) -> dict[str, Any]:
        body = self.body
        token_ids, positions = list(completion.token_ids), completion.logprobs
        text = completion.text
        finish_reason, stop_reason = completion.finish_reason, completion.stop_reason
        if body.prompt_only:
            text, token_ids, positions, finish_reason, stop_reason = "", [], [], "length", None
        logprobs = None
        if body.logprobs is not None and positions is not None:
            scored: list[PositionLogprobs | None] = list(positions)
            all_ids = token_ids
            if body.echo and output.prompt_logprobs is not None:
                scored, all_ids = [*output.prompt_logprobs, *positions], [*output.prompt_token_ids, *token_ids]
            logprobs = completion_logprobs(all_ids, scored, body.logprobs, self.context.engine.tokenizer, self.as_ids)
        return {
            "index": number,
            "text": self._prompt_text(output) + text if body.echo else text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
            "token_ids": token_ids if body.return_token_ids else None,
            "prompt_logprobs": prompt_logprobs(output.prompt_logprobs),
            "prompt_token_ids": output.prompt_token_ids if body.return_token_ids else None,
        }

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        return self.context.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)

    # -- a stream ------------------------------------------------------------------------------------------------

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as it is generated, as server-sent events."""
        body, usage = self.body, self.usage
        last_usage, every_usage = body.usage_wanted(self.context.args.enable_force_include_usage)
        head = {"id": self.call_id, "object": "text_completion", "created": self.created, "model": self.model}
        prefix = "data: " + json_bytes(head).decode()[:-1] + ',"choices":[{"index":'
        plain = not (body.echo or body.return_token_ids or body.logprobs is not None or every_usage)
        begun: dict[int, int] = {}  # choice -> characters before what comes next
        known_prompts: set[int] = set()
        single = len(self.prompts) == 1  # the usual case takes no detour
        source: AsyncGenerator[Any, None]
        if body.prompt_only and self.params.prompt_logprobs is None:
            source, single = self._echoes(), False
        else:
            source = self.streams()[0] if single else merged(self.streams())
        try:
            async for item in cast(AsyncIterator[Any], source):
                index, output = (0, item) if single else item
                if index not in known_prompts:
                    known_prompts.add(index)
                    usage.add_prompt(output)
                chunks = ""
                for completion in output.outputs:
                    number = index * self.params.n + completion.index
                    if plain:
                        usage.completion += len(completion.token_ids)
                        finish = completion.finish_reason
                        end = _NOT_FINISHED if finish is None else _ending(finish, completion.stop_reason)
                        chunks += (
                            f'{prefix}{number},"text":{json_text(completion.text)},"logprobs":null{end}{_PLAIN_TAIL}'
                        )
                    else:
                        chunks += self._rich_chunk(prefix, output, completion, number, begun, every_usage)
                if chunks:
                    yield chunks.encode()
        finally:
            await source.aclose()
        if last_usage:
            yield event({**head, "choices": [], "usage": usage.as_json()})
        yield DONE

    async def _echoes(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        for index, prompt in enumerate(self.prompts):
            yield index, await asyncio.to_thread(self._prompt_as_output, prompt)

    def _rich_chunk(
        self,
        prefix: str,
        output: RequestOutput,
        completion: CompletionOutput,
        number: int,
        begun: dict[int, int],
        with_usage: bool,
    ) -> str:
        """A chunk that carries more than text; ``begun`` has the characters each choice has sent."""
        body = self.body
        first = number not in begun
        text = "" if body.prompt_only else completion.text
        token_ids = [] if body.prompt_only else list(completion.token_ids)
        positions: list[Any] | None = None
        if completion.logprobs is not None or body.prompt_only:
            positions = [] if body.prompt_only else list(completion.logprobs or [])
        self.usage.completion += len(token_ids)
        scored_ids = token_ids
        if first and body.echo:
            text = self._prompt_text(output) + text
            if positions is not None and output.prompt_logprobs is not None:
                positions = [*output.prompt_logprobs, *positions]
                scored_ids = [*output.prompt_token_ids, *token_ids]
        logprobs = None
        if body.logprobs is not None and positions is not None:
            logprobs = completion_logprobs(
                scored_ids, positions, body.logprobs, self.context.engine.tokenizer, self.as_ids, begun.get(number, 0)
            )
        begun[number] = begun.get(number, 0) + len(text)
        finish, stop = completion.finish_reason, completion.stop_reason
        if body.prompt_only and finish is not None:
            finish, stop = "length", None
        rest = {
            "prompt_token_ids": output.prompt_token_ids if first and body.return_token_ids else None,
            "token_ids": token_ids if body.return_token_ids else None,
        }
        usage = json_bytes(self.usage.as_json() if with_usage else None).decode()
        return (
            f'{prefix}{number},"text":{json_text(text)},"logprobs":{json_bytes(logprobs).decode()}'
            f"{_ending(finish, stop)},{json_bytes(rest).decode()[1:-1]}}}],"
            f'"usage":{usage}}}\n\n'
        )


_NOT_FINISHED = ',"finish_reason":null,"stop_reason":null'
_PLAIN_TAIL = ',"prompt_token_ids":null,"token_ids":null}],"usage":null}\n\n'


def _ending(finish_reason: str | None, stop_reason: int | str | None) -> str:
    return f',"finish_reason":{json_bytes(finish_reason).decode()},"stop_reason":{json_bytes(stop_reason).decode()}'
