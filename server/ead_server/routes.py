"""Routes of our own on SGLang's app: schedules, rollouts, health."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as StarletteHTTPException

from ead_sampler.defaults import default_annealing, set_default_annealing, shared_defaults
from ead_sampler.kinds import PRESETS
from ead_sampler.requests import ANNEALING, check_server_mode
from ead_sampler.schedule import MAX_STEP, REGISTRY, AnnealingError, parse_annealing
from ead_server import metrics, packing, preview, settings, state
from ead_server.admission import check_range
from ead_server.asgi import all_routes, off_loop, route_of
from ead_server.errors import LimitExceeded, openai_error
from ead_server.first_mistake import stop_at_first_mistake
from ead_server.keys import PAGE, has_key, sglang_admin_paths
from ead_server.openapi import complete
from ead_server.rollouts import (
    Engine,
    FewKeys,
    Group,
    Job,
    KeptJobs,
    RolloutRequest,
    plan,
    until_gone,
)
from ead_server.routing import OpenAIErrorsRoute, refused_values, refused_weights
from ead_server.weight_files import WeightsRefused

Json = dict[str, Any]


router = APIRouter(route_class=OpenAIErrorsRoute, tags=["annealing"])


# --- the schedule and the step of requests that name none ----------------------------------------


Step = Annotated[
    int | None, Field(ge=0, le=MAX_STEP, description="null: count the weight updates again")
]


class StepSetting(FewKeys):
    """The training step to use from now on."""

    step: Step


class StepState(BaseModel):
    """Which training step schedules without one are given, and why."""

    step: int = Field(description="in effect now")
    set_to: int | None = Field(description="what was set here, if anything")
    weight_updates: int = Field(description="weight updates since the server started")


class Defaults(BaseModel):
    """What holds for requests that do not say."""

    annealing: Json | None = Field(description="the schedule; null: none")
    step: StepState


class DefaultsSetting(FewKeys):
    """What is to hold from now on; what is absent stays as it is."""

    annealing: Json | None = Field(None, description="a schedule; null: none")
    step: Step = None


@router.get("/v1/annealing")
async def read_defaults() -> Defaults:
    """The default schedule and the training step."""
    return Defaults(annealing=default_annealing(), step=await read_step())


@router.put("/v1/annealing")
async def set_defaults(setting: DefaultsSetting) -> Defaults:
    """Set either or both (admin). Answers in progress keep what they began with."""
    if setting.annealing is not None:
        check_server_mode({ANNEALING: setting.annealing})
    if "annealing" in setting.model_fields_set:
        set_default_annealing(setting.annealing)
    if "step" in setting.model_fields_set:
        shared_defaults().step_set_to = setting.step
    return await read_defaults()


@router.get("/v1/annealing/step")
async def read_step() -> StepState:
    """The training step s of schedules whose request names none."""
    shared = shared_defaults()
    return StepState(
        step=shared.step, set_to=shared.step_set_to, weight_updates=shared.weight_updates
    )


@router.put("/v1/annealing/step")
async def set_step(setting: StepSetting) -> StepState:
    """Set it (admin), for trainers that cannot thread a step through each request."""
    shared_defaults().step_set_to = setting.step
    return await read_step()


# --- looking at schedules ---------------------------------------------------------------------


@router.get("/v1/annealing/schema")
async def read_schemas() -> Json:
    """JSON Schema of the `annealing` object, by kind of schedule, and the presets' numbers."""
    schemas = {name: kind.model_json_schema() for name, kind in REGISTRY.items()}
    return {"schedules": schemas, "presets": PRESETS}


class Preview(BaseModel):
    """The temperatures that a schedule gives."""

    annealing: Json = Field(description="the schedule in full")
    temperatures: dict[int, list[float]] = Field(description="by training step")


@router.get(
    "/v1/annealing/preview",
    response_model=Preview,
    responses={200: {"content": {"image/svg+xml": {}}, "description": "JSON, or a plot"}},
)
def read_preview(
    request: Request,
    annealing: Annotated[str, Query(description="a schedule, as JSON", max_length=20_000)] = "{}",
    step: Annotated[
        list[Annotated[int, Field(ge=0, le=MAX_STEP)]],
        Query(description="training steps; none: the schedule's own, or 0", max_length=16),
    ] = [],  # noqa: B006  (FastAPI copies it)
    length: Annotated[int, Query(ge=1, le=100_000, description="tokens")] = 512,
    entropy: Annotated[
        float, Query(ge=0, le=20, description="nats, of every next token, where it matters")
    ] = 1.0,
) -> Response:
    """Temperatures of the first tokens, as JSON, or as a plot with `Accept: image/svg+xml`."""
    # no coroutine: FastAPI runs it in a thread, since it may take a second
    try:
        raw = orjson.loads(annealing)
    except orjson.JSONDecodeError as error:
        raise AnnealingError("annealing", f"is not valid JSON ({error})") from None
    schedule = parse_annealing(raw)
    curves = preview.temperatures(schedule, step, length, entropy)
    if "image/svg+xml" in request.headers.get("accept", ""):
        named = {f"step {s}": curve for s, curve in curves.items()}
        title = f"{schedule.schedule}: temperature by token"
        return Response(preview.svg(title, named), media_type="image/svg+xml")
    told = {str(s): curve for s, curve in curves.items()}
    content = packing.dumps({"annealing": schedule.model_dump(), "temperatures": told})
    return Response(content, media_type=packing.JSON)


_PAGE = (Path(__file__).parent / "page.html").read_bytes()
_ONLY_ITSELF = "default-src 'none'; connect-src 'self'; " + " ".join(
    f"{kind}-src 'unsafe-inline';" for kind in ("script", "style")
)


@router.get(PAGE, response_class=HTMLResponse)
async def read_page() -> Response:
    """A page for people: draw a schedule, and watch answers come in its colours."""
    headers = {"content-security-policy": _ONLY_ITSELF, "x-frame-options": "DENY"}
    return HTMLResponse(_PAGE, headers=headers)


# --- rollouts ----------------------------------------------------------------------------------

_kept = KeptJobs()


@router.post("/v1/rollouts")  # described in openapi.py
async def create_rollouts(request: Request) -> Response:
    """n answers to each of many prompts, with everything that a trainer needs of each token.

    `Accept` chooses the form: `application/json`, `application/vnd.safetensors`, or group by group
    as they complete, `application/x-ndjson` or `application/vnd.safetensors-seq`;
    `Accept-Encoding: gzip` compresses any of them. One prompt's failure is that group's `error`.
    Without an `Idempotency-Key` header, closing the connection stops the generation at once; with
    one it goes on, and the same request finds it again.
    """
    body = await request.body()
    parsed = await off_loop(len(body), _parsed, body)
    _check_size(parsed)
    form = _accepted(request.headers.get("accept", ""))
    key = _idempotency_key(request)
    job = _kept.find(key, body) if key else None
    if job is None:
        engine = Engine(request.app)
        job = Job(plan(parsed), engine, engine.manager.served_model_name)
        if key:
            _kept.keep(key, body, job)
    started = time.perf_counter()
    headers = {"vary": "accept, accept-encoding"}
    compress = packing.accepts_gzip(request.headers.get("accept-encoding", ""))
    if compress:
        headers["content-encoding"] = "gzip"
    if form in (packing.NDJSON, packing.FRAMES):
        parts = _streamed(job, form, started, keep=key is not None)
        body_parts = packing.compressed_parts(parts) if compress else parts
        return StreamingResponse(body_parts, media_type=form, headers=headers)
    await _finished_or_gone(job, request, keep=key is not None)
    write = packing.json_answer if form == packing.JSON else packing.binary_answer
    content = await off_loop(_size(*job.groups), write, job)
    metrics.count_rollouts(packing.FORMATS[form], len(content), time.perf_counter() - started)
    if compress:
        content = await packing.compressed(content)
    return Response(content, media_type=form, headers=headers)


async def _streamed(
    job: Job, form: str, started: float, *, keep: bool
) -> AsyncGenerator[bytes, None]:
    one, last, quiet = (
        (packing.json_line, packing.last_json_line, packing.QUIET_LINE)
        if form == packing.NDJSON
        else (packing.frame, packing.last_frame, packing.quiet_frame())
    )
    size = 0
    try:
        async for group in job.as_completed():
            if group is None:
                yield quiet
                continue
            part = await off_loop(_size(group), one, group)
            size += len(part)
            yield part
        yield last(job)
        metrics.count_rollouts(packing.FORMATS[form], size, time.perf_counter() - started)
    finally:
        if not keep:
            job.cancel()


async def _finished_or_gone(job: Job, request: Request, *, keep: bool) -> None:
    """Return when the job is done, or the client gone; then it is cancelled unless kept."""
    gone = asyncio.create_task(until_gone(request))
    finished = asyncio.create_task(job.wait())
    try:
        await asyncio.wait((gone, finished), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not job.done and not keep:
            job.cancel()
            finished.cancel()
    if finished.done():
        finished.result()


def _parsed(body: bytes) -> RolloutRequest:
    parsed = orjson.loads(body)
    if _MANY_DIGITS.search(body):  # orjson makes a float of an integer beyond 64 bits
        json.loads(body, parse_int=_check_integer)
    return RolloutRequest.model_validate(parsed)


_MANY_DIGITS = re.compile(rb"[0-9]{19}")


def _check_integer(digits: str) -> None:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
        raise LimitExceeded("body", f"integers must fit 64 bits, got {digits:.40}")


def _size(*groups: Group) -> int:
    """About as many bytes as these groups have in JSON."""
    answers = (answer for group in groups for answer in group.answers)
    return sum(50 * len(answer.get("token_ids", ())) for answer in answers)


def _accepted(accept: str) -> str:
    """The first of our forms that the client names; JSON for anything else."""
    named = [part.partition(";")[0].strip() for part in accept.split(",")]
    return next((kind for kind in named if kind in packing.FORMATS), packing.JSON)


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 1 <= len(key) <= 200:
        raise AnnealingError("Idempotency-Key", "must have 1 to 200 characters")
    if not getattr(request.app, "is_single_tokenizer_mode", False):
        raise AnnealingError(
            "Idempotency-Key", "a retry may reach another process (--tokenizer-worker-num)"
        )
    return key


def _check_size(parsed: RolloutRequest) -> None:
    limits = settings.current() or settings.Settings.model_validate({})
    check_range("n", parsed.n, 1, limits.max_n)
    for index, prompt in enumerate(parsed.prompts):
        check_range(f"prompts.{index}.n", prompt.n, 1, limits.max_n)
    answers = sum(prompt.n or parsed.n for prompt in parsed.prompts)
    if answers > limits.max_answers:
        raise LimitExceeded(
            "prompts", f"must ask for at most {limits.max_answers} answers in all, got {answers}"
        )


# --- health ------------------------------------------------------------------------------------


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


# --- on SGLang's app ---------------------------------------------------------------------------


def install_routes(app: FastAPI) -> None:
    """Our routes on the app, a description of all that is true, and errors that tell no paths."""
    from ead_server import weight_routes

    app.include_router(router)
    app.include_router(weight_routes.router)
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
        return refused_values(error)

    app.add_exception_handler(RequestValidationError, refuse_values)  # type: ignore[arg-type]
    if settings.current() is not None:
        stop_at_first_mistake(app.routes)
        app.add_exception_handler(WeightsRefused, refused_weights)  # type: ignore[arg-type]
        app.add_exception_handler(StarletteHTTPException, _no_such_route)  # type: ignore[arg-type]


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
