"""``/inspector``: a page that draws what the engine does, and the stream of frames it is drawn from.

The page itself is open; the stream wants the key, if there is one. Frames come from the engine's process as they go out
here: nothing is done with them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

import nanovllm
from nanovllm.entrypoints.serve.context import get_context
from nanovllm.entrypoints.serve.errors import ServeError
from nanovllm.entrypoints.serve.sse import EventStream

router = APIRouter(include_in_schema=False)

FOLDER = Path(nanovllm.__file__).parent / "assets" / "inspector"
PAGE = "index.html"
FILES = {
    "style.css": "text/css",
    "main.js": "text/javascript",
    "history.js": "text/javascript",
    "stream.js": "text/javascript",
    "panels.js": "text/javascript",
    "canvas.js": "text/javascript",
    "words.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
OPEN_PATHS = frozenset({"/inspector", *(f"/inspector/{name}" for name in FILES)})
MOST_VIEWERS = 16
KEEP_ALIVE = 15.0  # seconds; so often it is found out whether a silent viewer is still there
# Nothing is loaded from elsewhere, and no other page may show this one in a frame.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/inspector")
async def inspector() -> Response:
    """The page."""
    return FileResponse(FOLDER / PAGE, media_type="text/html", headers=HEADERS)


@router.get("/inspector/events")
async def events(request: Request) -> Response:
    """What steps do, as server-sent events, from the whole state on."""
    engine = get_context(request).engine
    if len(engine.viewers) >= MOST_VIEWERS:
        raise ServeError(503, f"{MOST_VIEWERS} viewers are connected already")
    await engine.ready()

    async def frames() -> AsyncIterator[bytes]:
        source = engine.viewers.frames()
        try:
            async for frame in source:
                yield b"data: " + frame + b"\n\n"
        finally:
            await source.aclose()

    return EventStream(frames(), request.url.path, KEEP_ALIVE, ending=b"")


@router.get("/inspector/{name}")
async def part(name: str) -> Response:
    """A file of the page."""
    if name not in FILES:
        raise ServeError(404, "the inspector has no such file")
    return FileResponse(FOLDER / name, media_type=FILES[name], headers=HEADERS)
