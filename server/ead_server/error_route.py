"""How our routes answer a bad request: the one place where an error becomes an HTTP answer."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import ValidationError

from ead_sampler.schedules import FieldError, short_repr
from ead_server.calls import note_refused
from ead_server.errors import BadField, LimitExceeded, RequestRefused, body_of, place_of

MAX_SETTING_BYTES = 4 << 20  # of bodies that are parsed between other clients' answers


class OpenAIErrorsRoute(APIRoute):
    """A bad request is a 400 in OpenAI's error shape, naming the field and the allowed range."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(_StrictRequest(request.scope, request.receive))
            except RequestRefused as error:
                return refusal(error)
            except RequestValidationError as error:
                return refusal(first_bad_value(error))
            except ValidationError as error:
                return refusal(_bad_value(error.errors(include_url=False)[0]))
            except orjson.JSONDecodeError as error:
                return refusal(_no_json(error))
            except FieldError as error:
                reason = "schedule" if error.field.startswith("annealing") else "invalid"
                return refusal(RequestRefused(str(error), field=error.field, reason=reason))

        return handle


class _StrictRequest(Request):
    """JSON as the standard has it: no NaN, no other encoding than UTF-8. As SGLang's own."""

    async def json(self) -> Any:
        body = await self.body()
        if len(body) > MAX_SETTING_BYTES:
            raise LimitExceeded("body", f"must have at most {MAX_SETTING_BYTES:,} bytes here")
        return orjson.loads(body)


def refusal(error: RequestRefused) -> Response:
    """The answer to a request that is refused; why is noted for the log and the metrics."""
    note_refused(error.reason)
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return JSONResponse(body_of(error), error.status, headers=headers)


def first_bad_value(error: RequestValidationError) -> RequestRefused:
    """The first thing that FastAPI found wrong, without the place in the code that it names."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _no_json(first["ctx"]["error"])
    return _bad_value({**first, "loc": first["loc"][1:]})


def _no_json(error: object) -> RequestRefused:
    return RequestRefused(f"the request body is not valid JSON: {error}")


def _bad_value(error: Any) -> BadField:
    """Of one of pydantic's errors."""
    field = place_of(error["loc"]) or "body"
    return BadField(field, f"{error['msg']}, got {short_repr(error.get('input'))}")
