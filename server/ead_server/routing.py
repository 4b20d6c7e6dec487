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

from ead_sampler.schedule import AnnealingError
from ead_server.admission import LimitExceeded
from ead_server.errors import openai_error
from ead_server.guard import tell_refused
from ead_server.rollouts import KeyReused
from ead_server.weight_files import WeightsRefused


class OpenAIErrorsRoute(APIRoute):
    """A bad request is a 400 in OpenAI's error shape, naming the field and the allowed range."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except RequestValidationError as error:
                return _refused(_first(error.errors(), skip=1))
            except ValidationError as error:
                return _refused(_first(error.errors(include_url=False), skip=0))
            except orjson.JSONDecodeError as error:
                return _refused((f"the request body is not valid JSON: {error}", None))
            except (AnnealingError, LimitExceeded) as error:
                tell_refused("schedule" if error.field.startswith("annealing") else "invalid")
                return _refused((str(error), error.field))
            except KeyReused as error:
                return _refused((str(error), "Idempotency-Key"), 422)
            except WeightsRefused as error:
                tell_refused("weights")
                return _refused((str(error), error.param), error.status)

        return handle


def _first(errors: Any, skip: int) -> tuple[str, str]:
    """Message and field of the first of pydantic's errors."""
    first = errors[0]
    field = ".".join(str(part) for part in first["loc"][skip:]) or "body"
    return f"{field}: {first['msg']}, got {first['input']!r:.200}", field


def _refused(error: tuple[str, str | None], status: int = 400) -> Response:
    message, field = error
    return JSONResponse(openai_error(message, field, code=status), status_code=status)
