"""Routes of our own on SGLang's app: the training step of requests that name none."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

from ead_sampler.defaults import training_step
from ead_sampler.schedule import MAX_STEP
from ead_server.errors import openai_error


class _OpenAIErrorsRoute(APIRoute):
    """A bad body is a 400 in OpenAI's error shape, naming the field and the allowed range."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except RequestValidationError as error:
                first = error.errors()[0]
                field = ".".join(str(part) for part in first["loc"][1:]) or "body"
                message = f"{field}: {first['msg']}, got {first['input']!r}"[:300]
                return JSONResponse(openai_error(message, field, code=400), status_code=400)

        return handle


router = APIRouter(route_class=_OpenAIErrorsRoute)


class StepSetting(BaseModel):
    """The training step to use from now on."""

    model_config = ConfigDict(extra="forbid", strict=True)

    step: int | None = Field(
        ..., ge=0, le=MAX_STEP, description="null: count the weight updates again"
    )


class StepState(BaseModel):
    """Which training step schedules without one are given, and why."""

    step: int = Field(description="in effect now")
    set_to: int | None = Field(description="what was set here, if anything")
    weight_updates: int = Field(description="weight updates since the server started")


@router.get("/v1/annealing/step")
async def read_step() -> StepState:
    """The training step s of schedules whose request names none."""
    step = training_step()
    return StepState(step=step.now, set_to=step.set_to, weight_updates=step.weight_updates)


@router.put("/v1/annealing/step")
async def set_step(setting: StepSetting) -> StepState:
    """Set it, for trainers that cannot thread a step through each request."""
    training_step().set_to = setting.step
    return await read_step()
