"""What an answer means: its error, its marker that the schedule was honoured, its end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import httpx
from pydantic import ValidationError

from ead_client._address import proxy_variable
from ead_client._clock import BaseClock
from ead_client._json import Lines
from ead_client._rollouts import Frames, Group, Rollouts, unpack
from ead_client._types import Chunk, Completion, Json
from ead_client.errors import (
    ApiError,
    ConnectionFailed,
    EadError,
    MalformedAnswer,
    RequestRefused,
    ScheduleIgnored,
    ServerUnavailable,
    TimedOut,
)

CompletionT = TypeVar("CompletionT", Completion, Chunk)

ROLLOUTS = "/v1/rollouts"

# the status that an error event means where it gives none: OpenAI's types, and SGLang's
_STATUS_OF_TYPE = {
    "invalid_request_error": 400,
    "badrequesterror": 400,
    "badrequest": 400,
    "valueerror": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "notfounderror": 404,
    "rate_limit_error": 429,
}


# --- errors --------------------------------------------------------------------------------------


def transport_error(error: httpx.HTTPError) -> EadError:
    """What httpx raised, as ours."""
    reason = f"{type(error).__name__}: {error}"
    unconnected = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)
    if isinstance(error, unconnected) and error._request is not None:
        url = error.request.url
        if url.host != "servers":  # see BaseClient: of several, none is the one
            reason += f", connecting to {url.scheme}://{url.netloc.decode()}"
        proxy = proxy_variable(str(url))
        reason += f" (by the proxy that {proxy} names)" if proxy else ""
    is_late = isinstance(error, httpx.TimeoutException)
    return TimedOut(reason) if is_late else ConnectionFailed(reason)


def check_status(response: httpx.Response) -> None:
    """Raise ApiError for an error answer, whose body has been read."""
    status = response.status_code
    if status < 400:
        return
    try:
        body = json.loads(response.content)
    except (ValueError, RecursionError):
        body = response.text
    error = error_of(body, status, response.text or response.reason_phrase)
    if status == 404 and response.url.path.endswith(ROLLOUTS):
        note = f"only ead servers have {ROLLOUTS}; SGLang's router passes none on"
        error = type(error)(status, f"{error.message}; {note}", param=error.param, kind=error.kind)
    raise error


def error_of(body: Any, status: int | None, text: str = "") -> ApiError:
    """The error in an answer or an event: OpenAI's object, SGLang's flat one, FastAPI's detail, or
    a text. status: None where the body must give it; text: the message where the body has none."""
    inner = body.get("error", body) if isinstance(body, Mapping) else body
    inner = inner if isinstance(inner, Mapping) else {"message": inner}
    given = inner.get("message") or inner.get("detail")
    message = given if isinstance(given, str) else json.dumps(given) if given else text
    kind, param = inner.get("type"), inner.get("param")
    if status is None:
        status = _status_in(inner) or (_status_in(body) if isinstance(body, Mapping) else None)
    status = status or _STATUS_OF_TYPE.get(str(kind).lower(), 500)
    unavailable = status >= 500 or status == 429
    return (ServerUnavailable if unavailable else RequestRefused)(
        status,
        (message or "no message")[:2000],
        param=None if param is None else str(param),
        kind=None if kind is None else str(kind),
    )


def _status_in(error: Mapping[str, Any]) -> int | None:
    for name in ("code", "status", "status_code"):
        value = error.get(name)
        number = int(value) if isinstance(value, str) and value.isdecimal() else value
        if isinstance(number, int) and 400 <= number < 600:
            return number
    return None


def _error_event(event: Any) -> ApiError | None:
    """The error that an event of a stream is, if it is one."""
    if not isinstance(event, Mapping) or ("choices" in event and not event.get("error")):
        return None
    flat = "id" not in event and ("message" in event or "detail" in event)
    nested = event.get("error") is not None or event.get("object") == "error"
    return error_of(event, None) if nested or flat else None


# --- answers -------------------------------------------------------------------------------------


def json_object(response: httpx.Response) -> Json:
    """The answer's JSON object. Raises MalformedAnswer."""
    try:
        found = json.loads(response.content)
    except (ValueError, RecursionError) as error:
        raise MalformedAnswer(f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise MalformedAnswer(f"not a JSON object: {found!r:.200}")
    return found


def _parse(kind: type[CompletionT], found: Any) -> CompletionT:
    try:
        return kind.model_validate(found)
    except (ValidationError, ValueError, AttributeError, TypeError) as error:
        raise MalformedAnswer(f"not a {kind.__name__.lower()}: {error}") from error


def checked_answer(body: Json, response: httpx.Response) -> Completion:
    """The answer, which must show that the schedule was honoured where one was asked for."""
    answer = _parse(Completion, json_object(response))
    for choice in answer.choices:
        _check_marker(
            body,
            choice.rollout is not None and choice.rollout.annealing is not None,
            choice.rollout is not None,
        )
    return answer


def _check_marker(body: Json, annealed: bool, recorded: bool) -> None:
    """Raise ScheduleIgnored for what the request has and its answer does not show."""
    fields = {**body, **(body.get("chat_template_kwargs") or {})}
    if fields.get("annealing") is not None and not annealed:
        reason = "asked for annealing, and the answer does not say it was applied"
        raise ScheduleIgnored(reason, param="annealing")
    if fields.get("rollout") not in (None, False) and not recorded:
        raise ScheduleIgnored("asked for a rollout, and the answer carries none", param="rollout")


def _checked_groups(body: Json, groups: list[Group]) -> list[Group]:
    """The groups, whose answers must show that the schedule was honoured."""
    for group in groups:
        for answer in group.answers:
            if answer.error is None:
                honoured = answer.rollout is not None and answer.rollout.annealing is not None
                _check_marker(body, honoured, True)
    return groups


def whole_rollouts(body: Json, data: bytes) -> Rollouts:
    """All groups of an answer of /v1/rollouts. Raises MalformedAnswer."""
    about, groups = unpack(data)
    if "id" not in about:
        raise MalformedAnswer(f"not rollouts: {about!r:.200}")
    return Rollouts(
        id=about["id"],
        model=about["model"],
        usage=about["usage"],
        groups=_checked_groups(body, groups),
    )


# --- streams -------------------------------------------------------------------------------------


class GroupStream:
    """Reads frames into groups, and knows whether the stream came to its end."""

    def __init__(self, body: Json, clock: BaseClock) -> None:
        self._body = body
        self._clock = clock
        self._frames = Frames()
        self._ended = False

    def feed(self, data: bytes) -> Iterator[Group]:
        self._clock.left()
        for frame in self._frames.feed(data):
            about, groups = unpack(frame)
            self._ended = about.get("object") == "rollouts.end"
            yield from _checked_groups(self._body, groups)

    def check_end(self) -> None:
        self._clock.left()
        if not self._ended:
            raise ConnectionFailed("the stream of groups ended before its last frame")


class ChunkStream:
    """Reads server-sent events into chunks, and checks the marker at the end of each choice."""

    def __init__(self, body: Json, clock: BaseClock) -> None:
        self._body = body
        self._clock = clock
        self._lines = Lines()
        self._annealed: set[int] = set()
        self._recorded: set[int] = set()
        self._ended = False

    def check_end(self) -> None:
        self._clock.left()
        if not self._ended:
            raise ConnectionFailed("the stream ended before its last event")

    def feed(self, data: bytes) -> Iterator[Chunk]:
        """The chunks that are now whole. Raises the errors of `error_of`, and MalformedAnswer."""
        try:
            for line in self._lines.feed(data):
                chunk = self._chunk(line)
                if chunk is not None:
                    yield chunk
        except UnicodeDecodeError as error:
            raise MalformedAnswer(f"not UTF-8: {error}") from error

    def _chunk(self, line: str) -> Chunk | None:
        self._clock.left()
        field, _, data = line.partition(":")
        data = data.removeprefix(" ")
        self._ended = self._ended or (field == "data" and data == "[DONE]")
        if field != "data" or self._ended:
            return None
        try:
            event = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise MalformedAnswer(f"not a chunk: {error}") from error
        failed = _error_event(event)
        if failed is not None:
            raise failed
        chunk = _parse(Chunk, event)
        for choice in chunk.choices:
            if choice.rollout is not None:
                self._recorded.add(choice.index)
                if choice.rollout.annealing is not None:
                    self._annealed.add(choice.index)
            if choice.finish_reason is not None:
                _check_marker(
                    self._body, choice.index in self._annealed, choice.index in self._recorded
                )
        return chunk
