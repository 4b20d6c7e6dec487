"""The one place where everything is put together: middlewares and routes on SGLang's app."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware

from ead_server import settings
from ead_server.annealing import routes as annealing_routes
from ead_server.annealing.middleware import AnnealingMiddleware
from ead_server.asgi import all_routes, route_of
from ead_server.edge import health
from ead_server.edge.fail_fast import stop_at_first_mistake
from ead_server.edge.guard import Guard
from ead_server.edge.keys import sglang_admin_paths
from ead_server.error_route import first_bad_value, refusal
from ead_server.errors import RequestRefused, openai_error
from ead_server.json_types import Json
from ead_server.openapi import complete
from ead_server.rollouts import routes as rollout_routes
from ead_server.weights import routes as weight_routes


def install() -> None:
    """Put the middlewares around SGLang's FastAPI app, and our routes on it, once."""
    from sglang.srt.entrypoints.http_server import app

    if any(added.cls is AnnealingMiddleware for added in app.user_middleware):
        return
    app.add_middleware(AnnealingMiddleware)
    app.add_middleware(Guard)  # the later one is the outer one
    if (current := settings.current()) is not None:
        # SGLang's lets the pages of every site read every answer; ours also marks the guard's own
        app.user_middleware[:] = [a for a in app.user_middleware if a.cls is not CORSMiddleware]
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(current.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
        )
    _install_routes(app)


def _install_routes(app: FastAPI) -> None:
    """Our routes on the app, a description of all that is true, and errors that tell no paths."""
    for routes in (annealing_routes, rollout_routes, health, weight_routes):
        app.include_router(routes.router)
    describe = app.openapi

    def openapi() -> Json:
        if app.openapi_schema is None:
            complete(describe(), frozenset(sglang_admin_paths(app.routes)))
        return describe()

    app.openapi = openapi  # type: ignore[method-assign]
    theirs: Any = app.exception_handlers[RequestValidationError]

    async def refuse_values(request: Request, error: RequestValidationError) -> Response:
        # SGLang's says in which file and line the route is; for two dialects it does not
        if settings.current() is None or route_of(request.scope).startswith(_OWN_ERRORS):
            return await theirs(request, error)
        return refusal(first_bad_value(error))

    app.add_exception_handler(RequestValidationError, refuse_values)  # type: ignore[arg-type]
    if settings.current() is not None:
        stop_at_first_mistake(app.routes)
        app.add_exception_handler(RequestRefused, _refuse)  # type: ignore[arg-type]
        app.add_exception_handler(StarletteHTTPException, _no_such_route)  # type: ignore[arg-type]


async def _refuse(request: Request, error: RequestRefused) -> Response:
    """Where one of SGLang's routes found out."""
    return refusal(error)


async def _no_such_route(request: Request, error: StarletteHTTPException) -> Response:
    """404 and 405 in OpenAI's shape; the latter with all methods, not only those of one route."""
    headers = dict(error.headers or {})
    if error.status_code == 405:
        found = (r for r in all_routes(request.app.routes) if _path(r) == route_of(request.scope))
        headers["allow"] = ", ".join(sorted({m for route in found for m in route.methods}))
    told = openai_error(str(error.detail), None, code=error.status_code)
    return JSONResponse(told, error.status_code, headers=headers)


def _path(route: Any) -> str | None:
    return getattr(route, "path", None) if hasattr(route, "methods") else None


_OWN_ERRORS = ("/v1/messages", "/v1/systemone")
