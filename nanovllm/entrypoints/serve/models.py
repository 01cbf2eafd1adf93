"""``/v1/models``: under which names the model answers."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from nanovllm.entrypoints.serve.context import ServeContext, get_context

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The models this server has."""
    context = get_context(request)
    return {"object": "list", "data": [_card(context, name) for name in context.model_names]}


@router.get("/v1/models/{name:path}", responses={404: {"description": "there is no such model"}})
async def retrieve_model(name: str, request: Request) -> dict[str, Any]:
    """One of them."""
    context = get_context(request)
    return _card(context, context.model_name(name))


def _card(context: ServeContext, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "nanovllm",
        "root": context.engine.model_config.model,
        "parent": None,
        "max_model_len": context.max_model_len,
        "permission": [],
    }
