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
from ead_sampler.requests import (
    ANNEALING,
    ROLLOUT,
    into_custom_params,
    observe_items,
    wants_arrays,
    with_default,
)
from ead_sampler.schedule import AnnealingError
from ead_server.errors import as_openai_error, openai_error
from ead_server.rollout import Recorder

Json = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPENAI_ROUTES = ("/v1/chat/completions", "/v1/completions")
ROUTES = (*OPENAI_ROUTES, "/generate")
_FIELDS = (ANNEALING.encode(), ROLLOUT.encode())


def install() -> None:
    """Put the middleware around SGLang's FastAPI app, and our routes on it, once."""
    from sglang.srt.entrypoints.http_server import app

    from ead_server.routes import router

    if not any(added.cls is AnnealingMiddleware for added in app.user_middleware):
        app.add_middleware(AnnealingMiddleware)
        app.include_router(router)


class AnnealingMiddleware:
    """See the module's docstring. Raises nothing: a bad field is a 400 in OpenAI's shape."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        path = _route(scope)
        if path not in ROUTES or scope["method"] not in ("POST", "PUT"):
            await self.app(scope, receive, send)
            return
        body = await _read_body(receive)
        if body is None:  # the client is gone
            return
        if not any(field in body for field in _FIELDS) and default_annealing() is None:
            await self.app(scope, _replay(body, receive), send)
            return
        try:
            request = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            await _send_error(send, f"the request body is not valid JSON: {error}", None)
            return
        try:
            rewritten = _rewrite(path, request)
        except AnnealingError as error:
            await _send_error(send, str(error), error.field)
            return
        if rewritten is request:  # the words appeared somewhere else, in a prompt perhaps
            await self.app(scope, _replay(body, receive), send)
            return

        scope = {**scope, "headers": _without_length(scope["headers"])}
        receive = _replay(orjson.dumps(rewritten), receive)
        if path not in OPENAI_ROUTES or not wants_arrays(rewritten["custom_params"]):
            # nothing to add: /generate carries the arrays in meta_info
            await self.app(scope, receive, _OpenAIErrors(send))
            return
        recorder = Recorder()
        token = observe_items.set(recorder.observe)
        try:
            await self.app(scope, receive, _Enriched(send, recorder))
        finally:
            observe_items.reset(token)


def _route(scope: Any) -> str | None:
    """The path below a proxy's prefix (--fastapi-root-path); None for what is not HTTP."""
    if scope["type"] != "http":
        return None
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


# --- requests ----------------------------------------------------------------------------------


def _rewrite(path: str, request: Any) -> Any:
    """The request with our fields moved to `custom_params`; itself when it has none."""
    if not isinstance(request, dict):
        return request
    if path in OPENAI_ROUTES:
        return into_custom_params(with_default(_from_template_kwargs(request)))
    params = request.get("sampling_params")
    if isinstance(params, dict):
        rewritten: Any = into_custom_params(params)
    elif isinstance(params, list):
        rewritten = [into_custom_params(p) if isinstance(p, dict) else p for p in params]
        if all(new is old for new, old in zip(rewritten, params, strict=True)):
            rewritten = params
    else:
        rewritten = params
    for field in (ANNEALING, ROLLOUT):
        if field in request:
            raise AnnealingError(field, "belongs inside sampling_params on this route")
    return request if rewritten is params else {**request, "sampling_params": rewritten}


def _from_template_kwargs(request: Json) -> Json:
    """Take the fields out of chat_template_kwargs, the one place that SGLang's router forwards."""
    kwargs = request.get("chat_template_kwargs")
    if not isinstance(kwargs, dict) or not (ANNEALING in kwargs or ROLLOUT in kwargs):
        return request
    rest = dict(kwargs)
    moved = {field: rest.pop(field) for field in (ANNEALING, ROLLOUT) if field in rest}
    return {**moved, **request, "chat_template_kwargs": rest}


async def _read_body(receive: Receive) -> bytes | None:
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` once and then whatever the client does next."""
    pending = [body]

    async def replay() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return replay


# --- answers -----------------------------------------------------------------------------------


class _OpenAIErrors:
    """A `send` that turns SGLang's error bodies into OpenAI's shape and leaves the rest alone."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.start: Message = {}
        self.body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            if message["status"] < 400:
                await self.send(message)
        elif self.start.get("status", 200) < 400:
            await self.send(message)
        else:
            self.body += message.get("body", b"")
            if not message.get("more_body", False):
                await _send_body(self.send, self.start, orjson.dumps(as_openai_error(self.body)))


class _Enriched:
    """A `send` that adds the recorder's values to an OpenAI answer, whole or streamed."""

    def __init__(self, send: Send, recorder: Recorder) -> None:
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
            await _send_body(self.send, self.start, self._whole(self.buffer))

    def _whole(self, body: bytes) -> bytes:
        if self.start["status"] >= 400:
            return orjson.dumps(as_openai_error(body))
        answer = orjson.loads(body)
        for choice in answer.get("choices") or ():
            index = choice["index"]
            self.recorder.enrich_logprobs(index, choice.get("logprobs"))
            rollout = self.recorder.rollout(index)
            if rollout is not None:
                choice["rollout"] = rollout
        return orjson.dumps(answer)

    def _event(self, line: bytes) -> bytes:
        if not line.startswith(b"data: {"):
            return line
        chunk = orjson.loads(line[len(b"data: ") :])
        if chunk.get("object") == "error":
            return b"data: " + orjson.dumps(as_openai_error(line[len(b"data: ") :]))
        for choice in chunk.get("choices") or ():
            index, last = choice["index"], choice.get("finish_reason") is not None
            self.recorder.enrich_logprobs(index, choice.get("logprobs"))
            if _opens_message(choice) and not last:
                continue
            rollout = self.recorder.rollout_chunk(index, last=last)
            if rollout is not None:
                choice["rollout"] = rollout
        return b"data: " + orjson.dumps(chunk)


def _opens_message(choice: Json) -> bool:
    """The chat chunk that only names the role; clients commonly skip it."""
    delta = choice.get("delta")
    return isinstance(delta, dict) and bool(delta.get("role")) and not delta.get("content")


async def _send_error(send: Send, message: str, param: str | None) -> None:
    start = {"type": "http.response.start", "status": 400, "headers": []}
    await _send_body(send, start, orjson.dumps(openai_error(message, param, code=400)))


async def _send_body(send: Send, start: Message, body: bytes) -> None:
    replaced = (b"content-length", b"content-type")
    headers = [(name, value) for name, value in start["headers"] if name.lower() not in replaced]
    headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({**start, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _without_length(headers: Any) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name.lower() != b"content-length"]
