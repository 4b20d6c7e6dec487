"""Every error of this package, and the shape that OpenAI's clients expect of errors.

    RequestRefused                  what a client asked for is not done: status, field, reason
    ├── BadField (a ValueError)     400: a value that cannot be used
    │   └── LimitExceeded           400: more than this server allows
    ├── KeyReused                   422: an idempotency key that came with another request
    ├── TooManyJobs                 429: as many kept jobs as there is room for
    └── WeightsRefused              400 to 503: an update of the weights that did not happen
    NothingLoaded (RuntimeError)    a load of weights failed before it changed anything
    ServerFailed (RuntimeError)     a server that could not be started, or ended

A schedule that cannot be used is a `ead_sampler.AnnealingError`, and a 400.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

Headers = tuple[tuple[bytes, bytes], ...]
CLOSE: Headers = ((b"connection", b"close"),)  # what else arrives of the call is not read
LATER: Headers = ((b"retry-after", b"5"),)  # seconds


class RequestRefused(Exception):
    """What the client asked for is not done.

    status: of HTTP. reason: one of those that the metrics count. field: of the request, where one
    is wrong. headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        reason: str = "invalid",
        field: str | None = None,
        headers: Headers = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.reason = reason
        self.field = field
        self.headers = headers


class BadField(RequestRefused, ValueError):
    """The value of `field` cannot be used. A ValueError, by which SGLang knows a bad request."""

    def __init__(self, field: str, message: str, reason: str = "invalid") -> None:
        super().__init__(f"{field}: {message}", field=field, reason=reason)


class LimitExceeded(BadField):
    """`field` is beyond a limit of this server."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message, reason="limit")


class KeyReused(RequestRefused):
    """The idempotency key came with another request before."""

    def __init__(self) -> None:
        message = f"{_KEY}: was used before, with another request"
        super().__init__(message, status=422, field=_KEY)


class TooManyJobs(RequestRefused):
    """As many jobs with a key as are kept are still running."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=429, field=_KEY, headers=LATER)


class WeightsRefused(RequestRefused):
    """An update that is not taken. field: the tensor that is wrong, if one is."""

    def __init__(self, message: str, *, status: int = 400, field: str | None = None) -> None:
        super().__init__(message, status=status, reason="weights", field=field)


class NothingLoaded(RuntimeError):
    """A load failed before it changed anything."""


class ServerFailed(RuntimeError):
    """The server could not start, ended, or did not become ready in time; the message says why."""


_KEY = "Idempotency-Key"
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def body_of(error: RequestRefused) -> dict[str, Any]:
    """The body of the answer to a request that is refused."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = _KINDS.get(error.status, kind)
    return openai_error(str(error), error.field, kind, error.status)


def openai_error(
    message: str, param: str | None, kind: str | None = None, code: Any = None
) -> dict[str, Any]:
    """An error body as OpenAI clients expect it."""
    return {
        "error": {
            "message": message,
            "type": kind or "invalid_request_error",
            "param": param,
            "code": code,
        }
    }


def as_openai_error(body: bytes) -> dict[str, Any]:
    """SGLang's error body, in whichever of its shapes, as OpenAI's {"error": {...}}."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        parsed = body.decode(errors="replace")
    error = parsed.get("error", parsed) if isinstance(parsed, dict) else parsed
    if not isinstance(error, dict):
        error = {"message": str(error)}
    message = str(error.get("message") or error.get("detail") or error)
    kind, code = error.get("type"), error.get("code")
    if str(kind).isdigit():  # SGLang's, where it has nothing but a status
        kind = "server_error" if int(str(kind)) >= 500 else None
    return openai_error(message, error.get("param"), kind, code)


def place_of(loc: Iterable[int | str]) -> str:
    """Where pydantic found a mistake, without the names of its own validators and types, which are
    in brackets: list[int]."""
    return ".".join(str(part) for part in loc if "[" not in str(part))
