"""The `annealing` and `rollout` fields of the OpenAI routes and of /generate.

An ASGI middleware around SGLang's own app: it checks the two fields, moves them to where SGLang
carries them to the scheduler, and adds what the sampler recorded to the answer. A request that
has neither field passes through byte for byte, as does its answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from ead_sampler.defaults import default_annealing
from ead_sampler.in_tokenizer.cost import check_cost
from ead_sampler.in_tokenizer.fields import (
    into_custom_params,
    observe_items,
    wants_arrays,
    with_default,
)
from ead_sampler.names import ANNEALING, ROLLOUT
from ead_sampler.schedules import FieldError
from ead_server.annealing.recorder import Recorder
from ead_server.asgi import Message, Receive, Send, read_body, replay, route_of, send_json
from ead_server.calls import note_refused
from ead_server.edge.bodies import may_name
from ead_server.error_answers import OpenAIErrors, send_refusal
from ead_server.errors import RequestRefused, as_openai_error
from ead_server.json_types import Json

OPENAI_ROUTES = ("/v1/chat/completions", "/v1/completions", "/invocations")
# Other dialects, whose requests and answers have no place for our fields, and what samples
# nothing: refused, not ignored.
WITHOUT_FIELDS = (
    "/v1/embeddings",
    "/v1/classify",
    "/v1/rerank",
    "/v1/score",
    "/encode",
    "/classify",
    "/v1/responses",
    "/v1/messages",
    "/api/chat",
    "/api/generate",
    "/vertex_generate",
)
ROUTES = (*OPENAI_ROUTES, "/generate", *WITHOUT_FIELDS)
_NAMES = (ANNEALING, ROLLOUT)


class AnnealingMiddleware:
    """See the module's docstring. Raises nothing: a bad field is a 400 in OpenAI's shape."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        path = route_of(scope)
        if path not in ROUTES or scope["method"] not in ("POST", "PUT"):
            await self.app(scope, receive, send)
            return
        body = await read_body(receive)
        if body is None:  # the client is gone
            return
        if not may_name(body, *_NAMES) and default_annealing() is None:
            await self.app(scope, replay(body, receive), send)
            return
        try:
            request = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            message = f"the request body is not valid JSON: {error}"
            await send_refusal(send, RequestRefused(message))
            return
        try:
            rewritten = _rewrite(path, request)
        except FieldError as error:
            note_refused("schedule")
            await send_refusal(send, RequestRefused(str(error), field=error.field))
            return
        if rewritten is request:  # the words appeared somewhere else, in a prompt perhaps
            await self.app(scope, replay(body, receive), send)
            return

        scope = {**scope, "headers": _without_length(scope["headers"])}
        receive = replay(orjson.dumps(rewritten), receive)
        if path not in OPENAI_ROUTES:  # /generate carries the arrays in meta_info
            await self.app(scope, receive, OpenAIErrors(send))
            return
        if not wants_arrays(rewritten["custom_params"]):
            await self.app(scope, receive, _Enriched(send, None))
            return
        recorder = Recorder()
        token = observe_items.set(recorder.observe)
        try:
            await self.app(scope, receive, _Enriched(send, recorder))
        finally:
            observe_items.reset(token)


# --- requests ----------------------------------------------------------------------------------


def _rewrite(path: str, request: Any) -> Any:
    """The request with our fields moved to `custom_params`; itself when it has none."""
    if not isinstance(request, dict):
        return request
    if path in WITHOUT_FIELDS:
        for field in _NAMES:
            if request.get(field) is not None:
                raise FieldError(field, f"not on this route; use {', '.join(OPENAI_ROUTES)}")
        return request
    if path in OPENAI_ROUTES:
        return into_custom_params(with_default(_from_template_kwargs(request)))
    params = request.get("sampling_params")
    if isinstance(params, dict):
        rewritten: Any = into_custom_params(params)
    elif isinstance(params, list):
        check_cost(params)
        rewritten = [into_custom_params(p) if isinstance(p, dict) else p for p in params]
        if all(new is old for new, old in zip(rewritten, params, strict=True)):
            rewritten = params
    else:
        rewritten = params
    for field in _NAMES:
        if field in request:
            raise FieldError(field, "belongs inside sampling_params on this route")
    return request if rewritten is params else {**request, "sampling_params": rewritten}


def _from_template_kwargs(request: Json) -> Json:
    """Take the fields out of chat_template_kwargs, the one place that SGLang's router forwards."""
    kwargs = request.get("chat_template_kwargs")
    if not isinstance(kwargs, dict) or not (ANNEALING in kwargs or ROLLOUT in kwargs):
        return request
    rest = dict(kwargs)
    moved = {field: rest.pop(field) for field in _NAMES if field in rest}
    return {**moved, **request, "chat_template_kwargs": rest}


# --- answers -----------------------------------------------------------------------------------


class _Enriched:
    """A `send` that adds the recorder's values to an OpenAI answer, whole or streamed.

    recorder: None where no arrays are asked for; what strict clients refuse is taken out all the
    same.
    """

    def __init__(self, send: Send, recorder: Recorder | None) -> None:
        self.send = send
        self.recorder = recorder
        self.start: Message = {}
        self.streams = False
        self.buffer = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            headers = dict(message.get("headers", ()))
            self.streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            if self.streams:
                await self.send(message)
            return
        more = message.get("more_body", False)
        self.buffer += message.get("body", b"")
        if self.streams:
            whole, end, rest = self.buffer.rpartition(b"\n\n")
            if not more:
                whole, end, rest = self.buffer, b"", b""
            self.buffer = rest
            lines = [self._event(line) for line in whole.split(b"\n")]
            await self.send({**message, "body": b"\n".join(lines) + end})
        elif not more:
            answer = self._whole(self.buffer)
            await send_json(self.send, self.start["status"], answer, self.start["headers"])

    def _whole(self, body: bytes) -> Json:
        if self.start["status"] >= 400:
            return as_openai_error(body)
        answer: Json = orjson.loads(body)
        for choice in answer.get("choices") or ():
            if self.recorder is not None:
                self.recorder.enrich(choice)
        # OpenAI's metadata are strings, and strict clients (Pydantic AI) refuse SGLang's list of
        # spans; every rollout has its own
        (answer.get("metadata") or {}).pop("weight_versions", None)
        return answer

    def _event(self, line: bytes) -> bytes:
        if not line.startswith(b"data: {"):
            return line
        chunk = orjson.loads(line[len(b"data: ") :])
        if chunk.get("object") == "error":
            return b"data: " + orjson.dumps(as_openai_error(line[len(b"data: ") :]))
        for choice in chunk.get("choices") or ():
            if self.recorder is not None:
                self.recorder.enrich_chunk(choice)
        return b"data: " + orjson.dumps(chunk)


def _without_length(headers: Any) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name.lower() != b"content-length"]
