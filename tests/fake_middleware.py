"""Middleware for the tests of ``--middleware``: a class, and a function."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response


class AddHeader:
    """Marks every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def marked(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-added", b"yes")]
            await send(message)

        await self.app(scope, receive, marked)


async def refuse_teapots(request: Any, call_next: Any) -> Any:
    """Answers some requests itself."""
    return Response(status_code=418) if "x-teapot" in request.headers else await call_next(request)
