"""The routes that say how the server is."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from ead_server import settings
from ead_server.edge.keys import has_key
from ead_server.error_route import OpenAIErrorsRoute
from ead_server.lifecycle import state

router = APIRouter(route_class=OpenAIErrorsRoute, tags=["annealing"])


class Health(BaseModel):
    """`status` says why a server is not ready."""

    status: str


@router.get("/health/live")
async def read_alive() -> Health:
    """200 as long as this process answers at all; restart it when it does not."""
    return Health(status="alive")


@router.get("/health/ready", responses={503: {"model": Health}})
async def read_ready(request: Request) -> Response:
    """200 when requests are taken and answered: the model is loaded, nothing paused it, the engine
    is not stuck, and the server is not shutting down. With a key, the reason in full."""
    status, current = state.now(), settings.current()
    whole = current is None or has_key(current, request.headers.raw)
    why = status.why if whole else state.in_short(status.why)
    code = 200 if status.state == state.State.READY else 503
    return JSONResponse({"status": why}, status_code=code)
