"""OpenAI's error shape, and what is raised for a request that is refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson


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


class LimitExceeded(ValueError):
    """A request beyond a limit of this server: a 400. `field` names what is too large."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


@dataclass(frozen=True)
class Refusal:
    """An answer of ours in place of the server's."""

    status: int
    message: str
    reason: str  # for metrics.count_refused
    param: str | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()
