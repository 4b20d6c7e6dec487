"""How our routes answer a bad request."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import ValidationError

from ead_sampler.schedule import AnnealingError, shown
from ead_server.calls import tell_refused
from ead_server.errors import LimitExceeded, openai_error, place_of
from ead_server.rollouts import KeyReused, TooManyJobs
from ead_server.weight_files import WeightsRefused

MAX_SETTING_BYTES = 4 << 20  # of bodies that are parsed between other clients' answers
_NO_JSON = "the request body is not valid JSON"


class OpenAIErrorsRoute(APIRoute):
    """A bad request is a 400 in OpenAI's error shape, naming the field and the allowed range."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(_StrictRequest(request.scope, request.receive))
            except RequestValidationError as error:
                return refused_values(error)
            except ValidationError as error:
                return _refused(_told(error.errors(include_url=False)[0]))
            except orjson.JSONDecodeError as error:
                return _refused((f"{_NO_JSON}: {error}", None))
            except (AnnealingError, LimitExceeded) as error:
                tell_refused("schedule" if error.field.startswith("annealing") else "invalid")
                return _refused((str(error), error.field))
            except KeyReused as error:
                return _refused((str(error), "Idempotency-Key"), 422)
            except TooManyJobs as error:
                told = openai_error(str(error), "Idempotency-Key", "rate_limit_error", 429)
                return JSONResponse(told, 429, headers={"retry-after": "5"})
            except WeightsRefused as error:
                return await refused_weights(request, error)

        return handle


class _StrictRequest(Request):
    """JSON as the standard has it: no NaN, no other encoding than UTF-8. As SGLang's own."""

    async def json(self) -> Any:
        body = await self.body()
        if len(body) > MAX_SETTING_BYTES:
            raise LimitExceeded("body", f"must have at most {MAX_SETTING_BYTES:,} bytes here")
        return orjson.loads(body)


def refused_values(error: RequestValidationError) -> Response:
    """The first thing that FastAPI found wrong, without the place in the code that it names."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _refused((f"{_NO_JSON}: {first['ctx']['error']}", None))
    return _refused(_told({**first, "loc": first["loc"][1:]}))


async def refused_weights(request: Request, error: WeightsRefused) -> Response:
    """Also where one of SGLang's routes found out."""
    tell_refused("weights")
    return _refused((str(error), error.param), error.status)


def _told(error: Any) -> tuple[str, str]:
    """Message and field of one of pydantic's errors."""
    field = place_of(error["loc"]) or "body"
    return f"{field}: {error['msg']}, got {shown(error.get('input'))}", field


def _refused(error: tuple[str, str | None], status: int = 400) -> Response:
    message, field = error
    return JSONResponse(openai_error(message, field, code=status), status_code=status)
