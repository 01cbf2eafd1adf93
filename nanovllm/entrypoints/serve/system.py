"""State of the server: ``/health``, ``/ping``, ``/version``, ``/load``."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from nanovllm import __version__
from nanovllm.entrypoints.serve.context import get_context
from nanovllm.entrypoints.serve.errors import ServeError

router = APIRouter()

Seconds = Annotated[float | None, Query(gt=0, description="503 if work is under way and the last step is older")]


@router.get("/health", responses={503: {"description": "the engine does not work, or the server is ending"}})
@router.get("/ping", include_in_schema=False)
@router.post("/ping", include_in_schema=False)
async def health(request: Request, max_step_age: Seconds = None) -> Response:
    """Whether the engine works: its last step's age in seconds, how many requests it has, and the faults it has met."""
    context = get_context(request)
    engine = context.engine
    await engine.check_health()
    if context.draining:
        raise ServeError(503, "the server is ending")
    stats = engine.stats
    age = stats.last_step_age()
    busy = stats.num_running + stats.num_waiting
    if max_step_age is not None and busy and age > max_step_age:
        raise ServeError(503, f"{busy} requests are under way and the last step was {age:.1f} s ago")
    state = {
        "status": "ok",
        "last_step_age": round(age, 3),
        "num_running": stats.num_running,
        "num_waiting": stats.num_waiting,
        "faults": {name: count for name, count in stats.faults.items() if count},
        "last_fault_age": None if (fault_age := stats.last_fault_age()) is None else round(fault_age, 3),
    }
    return JSONResponse(state)


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of this server."""
    return {"version": __version__}


@router.get("/load")
async def load(request: Request) -> dict[str, Any]:
    """Requests under way."""
    return {"server_load": get_context(request).load}
