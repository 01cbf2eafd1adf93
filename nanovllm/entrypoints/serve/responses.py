"""``/v1/responses``: a chat turn in OpenAI's newer shape, which can be stored, continued and run in the background."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from nanovllm.entrypoints.serve.admission import Ticket, get_ticket
from nanovllm.entrypoints.serve.chat import prepare_chat
from nanovllm.entrypoints.serve.context import ServeContext, get_context
from nanovllm.entrypoints.serve.errors import ServeError, as_serve_error
from nanovllm.entrypoints.serve.protocol.errors import RESPONSES
from nanovllm.entrypoints.serve.protocol.responses import ResponsesRequest
from nanovllm.entrypoints.serve.responses_input import Message, conversation, with_instructions
from nanovllm.entrypoints.serve.responses_output import ResponseHead, output_items
from nanovllm.entrypoints.serve.responses_store import ResponseStore, StoredResponse
from nanovllm.entrypoints.serve.responses_stream import ResponseStream
from nanovllm.entrypoints.serve.sse import EventStream, answer_unless_gone, json_bytes
from nanovllm.entrypoints.serve.turns import AnswerReader, chat_request
from nanovllm.errors import ParameterError

router = APIRouter()


@router.post("/v1/responses", responses=RESPONSES, response_model=None)
async def create_response(body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation."""
    context = get_context(request)
    call = await _Call.make(context, _store(request), body, get_ticket(request))
    if body.background:
        return call.start()
    if body.stream:
        return EventStream(call.stream().events(), request.url.path, context.args.sse_keep_alive_interval, b"")
    return await answer_unless_gone(request, call.answer())


@router.get("/v1/responses/{response_id}", responses=RESPONSES, response_model=None)
async def get_response(response_id: str, request: Request) -> Response:
    """A response that was stored, in its present state."""
    if request.query_params.get("stream", "false") not in ("false", "0"):
        raise ParameterError("stored responses are not streamed", "stream", request.query_params["stream"])
    return _json(_store(request).get(response_id).response)


@router.post("/v1/responses/{response_id}/cancel", responses=RESPONSES, response_model=None)
async def cancel_response(response_id: str, request: Request) -> Response:
    """End a response that is under way in the background."""
    stored = _store(request).get(response_id)
    if not stored.response["background"]:
        raise ServeError(400, "only responses in the background can be cancelled", "response_id")
    if stored.task is not None:
        stored.task.cancel()
        await asyncio.wait((stored.task,))
        await asyncio.sleep(0)  # its callback has been told
    return _json(stored.response)


@dataclass
class _Call:
    """One request on its way."""

    head: ResponseHead
    reader: AnswerReader
    store: ResponseStore
    ticket: Ticket
    messages: list[Message]  # the conversation, without instructions
    size: int  # characters of it that are new

    @classmethod
    async def make(cls, context: ServeContext, store: ResponseStore, body: ResponsesRequest, ticket: Ticket) -> _Call:
        """Check a request and render its conversation.

        Raises:
            ParameterError: it cannot be honoured.
            ServeError: there is no such model, no such earlier response, or no room.
        """
        body.refuse_unsupported()
        earlier: list[Message] = []
        if body.previous_response_id is not None:
            stored = store.get(body.previous_response_id, "previous_response_id")
            if stored.task is not None:
                raise ServeError(400, "the previous response is not finished", "previous_response_id")
            answered = stored.response["output"]
            earlier = [*stored.messages, *(conversation(answered) if answered else [])]
        new = conversation(body.input)
        fields = {
            "model": body.model,
            "messages": with_instructions(body.instructions, [*earlier, *new]),
            "max_completion_tokens": body.max_output_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "tools": [_chat_tool(tool, index) for index, tool in enumerate(body.tools or ())] or None,
            "tool_choice": body.tool_choice,
            "parallel_tool_calls": body.parallel_tool_calls,
            "response_format": body.response_format(),
            "reasoning_effort": body.reasoning.effort if body.reasoning is not None else None,
            "stream": body.stream,
            "user": body.user,
        }
        chat = chat_request(fields, body.model_extra)
        response_id = f"resp_{chat.request_id or uuid.uuid4().hex}"
        if response_id in store:
            raise ServeError(400, "there is a response of this id", "request_id")
        turn = await prepare_chat(context, chat, response_id, ticket)
        head = ResponseHead(body, turn, response_id)
        size = sum(len(str(message)) for message in new)
        return cls(head, AnswerReader(turn), store, ticket, [*earlier, *new], size)

    async def answer(self) -> Response:
        """The whole response."""
        response = await self._generate()
        self._keep(response)
        return _json(response)

    def stream(self) -> ResponseStream:
        """The response as events."""
        return ResponseStream(self.head, self.reader, self._keep)

    def start(self) -> Response:
        """Go on in the background."""
        queued = self.head.as_json("queued")
        stored = StoredResponse(queued, self.messages, self.size)
        self.store.put(stored)
        self.ticket.hold()
        stored.task = asyncio.create_task(self._run(stored))

        def settle(task: asyncio.Task[None]) -> None:
            stored.task = None
            self.ticket.release()
            if task.cancelled():
                stored.response = self.head.as_json("cancelled")

        stored.task.add_done_callback(settle)
        return _json(queued)

    async def _run(self, stored: StoredResponse) -> None:
        stored.response = self.head.as_json("in_progress")
        try:
            stored.response = await self._generate()
        except Exception as fault:
            error = {"code": "server_error", "message": as_serve_error(fault).message}
            stored.response = self.head.as_json("failed", error=error)

    async def _generate(self) -> dict[str, Any]:
        answer = await self.reader.whole()
        items = output_items(answer, self.reader.finished)
        return self.head.as_json("completed" if self.reader.finished else "incomplete", items, self.reader.usage)

    def _keep(self, response: dict[str, Any]) -> None:
        if self.head.body.store is not False:
            self.store.put(StoredResponse(response, self.messages, self.size + len(str(response["output"]))))


def _chat_tool(tool: dict[str, Any], index: int) -> dict[str, Any]:
    kind = tool.get("type")
    if kind != "function":
        raise ParameterError(
            "the server has no tools of its own: a tool must be of type function", f"tools[{index}].type", kind
        )
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _store(request: Request) -> ResponseStore:
    state = request.app.state
    if not hasattr(state, "responses"):
        state.responses = ResponseStore()
    store: ResponseStore = state.responses
    return store


def _json(value: dict[str, Any]) -> Response:
    return Response(json_bytes(value), media_type="application/json")
