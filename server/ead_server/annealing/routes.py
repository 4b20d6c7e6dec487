"""Routes for looking at schedules, and for those of requests that name none."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import orjson
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field

from ead_sampler.defaults import default_annealing, set_default_annealing, shared_defaults
from ead_sampler.in_tokenizer.server_mode import check_server_mode
from ead_sampler.names import ANNEALING
from ead_sampler.schedules import MAX_STEP, PRESETS, REGISTRY, AnnealingError, parse_annealing
from ead_server.annealing import preview
from ead_server.edge.fail_fast import FewKeys
from ead_server.edge.keys import PAGE
from ead_server.error_route import OpenAIErrorsRoute
from ead_server.json_types import Json
from ead_server.media_types import JSON

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
    content = orjson.dumps({"annealing": schedule.model_dump(), "temperatures": told})
    return Response(content, media_type=JSON)


_PAGE = (Path(__file__).parent / "page.html").read_bytes()
_ONLY_ITSELF = "default-src 'none'; connect-src 'self'; " + " ".join(
    f"{kind}-src 'unsafe-inline';" for kind in ("script", "style")
)


@router.get(PAGE, response_class=HTMLResponse)
async def read_page() -> Response:
    """A page for people: draw a schedule, and watch answers come in its colours."""
    headers = {"content-security-policy": _ONLY_ITSELF, "x-frame-options": "DENY"}
    return HTMLResponse(_PAGE, headers=headers)
