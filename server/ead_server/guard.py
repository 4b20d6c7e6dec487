"""Who may call what, how large a request may be, and one log line for each: `ead serve`'s edge.

An ASGI middleware, outside everything else. A server that SGLang's own launcher started has no
settings, and this lets everything through.

Keys: health is open. Everything else needs the API key where one is set. What changes the server
(weights, schedule, step, pauses, aborts, profiles: what SGLang marks as admin, our own, and
sessions, which hold memory) needs the admin key, and is closed where none is set; the admin key
opens everything.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from ead_server import metrics, settings, state
from ead_server.asgi import (
    Message,
    Receive,
    Send,
    all_routes,
    off_loop,
    read_body,
    replay,
    route_of,
    send_json,
)
from ead_server.ending import call_in_progress, from_start_to_end
from ead_server.errors import openai_error
from ead_server.settings import Settings
from ead_server.weight_files import WeightsRefused, files_of, tensors_in
from ead_server.weights import served_weights

PAGE = "/annealing"  # says nothing that is not in this repository
OPEN = (PAGE, "/health", "/health_generate", "/health/live", "/health/ready", "/ready", "/ping")
ADMIN_ROUTES = {  # besides those that SGLang marks as such
    ("PUT", "/v1/annealing"),
    ("PUT", "/v1/annealing/step"),
    *((method, f"/{what}_session") for method in ("GET", "POST") for what in ("open", "close")),
}
# bodies that are worked on as they come, whatever their size
STREAMED = ("/v1/weights/tensors", "/v1/weights/adapters")
# They carry pickled data, which this server does not unpack, whoever sends it.
PICKLED = (
    "/update_weights_from_tensor",
    "/update_weights_from_ipc",
    "/load_lora_adapter_from_tensors",
)
LOADED_FROM = {
    "/v1/weights/disk": "folder",
    "/update_weights_from_disk": "model_path",
    "/load_lora_adapter": "lora_path",
}
MAX_NESTING = 100  # of JSON: Python's and orjson's own limits end in errors of the server
MAX_HEADER_BYTES = 64 << 10  # as h11, one of uvicorn's two parsers; the other has no limit

log = logging.getLogger("ead.requests")


@dataclass
class Call:
    """One request, as it is told in the log and counted. Filled in on its way."""

    method: str
    path: str
    settings: Settings
    started: float = field(default_factory=time.perf_counter)
    status: int = 0  # 0: the client left before an answer
    bytes_out: int = 0
    answers: int = 0
    tokens: dict[str, int] = field(default_factory=dict)  # by engine request
    schedule: str | None = None
    refused: str | None = None  # a reason for metrics.refused
    bad_value: str | None = None  # what the engine said of the request


# The request that the code is working for; None in SGLang's own work and on health routes.
current_call: ContextVar[Call | None] = ContextVar("ead_current_call", default=None)


def tell_refused(reason: str) -> None:
    """Why the request that is being worked on is refused, for the log and the metrics."""
    if (call := current_call.get()) is not None:
        call.refused = reason


@dataclass(frozen=True)
class Refusal:
    """An answer of ours in place of the server's."""

    status: int
    message: str
    reason: str  # for metrics.refused
    param: str | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Guard:
    """See the module's docstring."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self._admin_paths: frozenset[str] | None = None

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        current, path = settings.current(), route_of(scope)
        if current is not None and scope["type"] == "lifespan":
            await self.app(scope, from_start_to_end(receive), send)
        elif current is None or path in OPEN:
            if path == "/ready":  # SGLang's own remembers one failed health check
                scope = {**scope, "path": scope["path"].removesuffix(path) + "/health/ready"}
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            if self._refused_key(current, "GET", path, scope) is not None:
                await send({"type": "websocket.close", "code": 1008})
                return
            token = current_call.set(Call("GET", path, current))
            try:
                await self.app(scope, receive, send)
            finally:
                current_call.reset(token)
        elif _same(_bearer(scope["headers"]), current.warm_up_key):
            await self._http(current, path, scope, receive, send)
        else:
            with call_in_progress():
                await self._http(current, path, scope, receive, send)

    async def _http(
        self, current: Settings, path: str, scope: Any, receive: Receive, send: Send
    ) -> None:
        call = Call(scope["method"], path, current)

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
            call.bytes_out += len(message.get("body", b""))
            await send(message)

        token = current_call.set(call)
        try:
            body: bytes | Refusal | None = (
                _refused_headers(scope)
                or self._refused_key(current, call.method, path, scope)
                or _draining(call, scope)
                or _incomplete(call, is_admin=self._is_admin(call.method, path, scope))
                or (b"" if path in STREAMED else await self._body(call, scope, receive))
            )
            if isinstance(body, bytes):
                body = (
                    _draining(call, scope)  # it may have been long on its way
                    or _refused_load(current, path, body)
                    or _refused_template(body)
                    or body
                )
            if isinstance(body, Refusal):
                call.refused = body.reason
                await _refuse(observed, body)
            elif body is not None:
                receive = receive if path in STREAMED else replay(body, receive)
                await self.app(scope, receive, observed)
        except Exception as error:
            bad = call.bad_value if isinstance(error, ValueError) else None
            if not call.status:
                message = bad or "an error in the server, told in its log"
                status, reason = (400, "invalid") if bad else (500, "error")
                await _refuse(observed, Refusal(status, message, call.refused or reason))
            if not bad:  # a route of SGLang's that leaves bad values uncaught is no news
                raise
        finally:
            current_call.reset(token)
            _tell(call)

    # --- keys ------------------------------------------------------------------------------

    def _refused_key(self, current: Settings, method: str, path: str, scope: Any) -> Refusal | None:
        if method == "OPTIONS":
            return None
        given = _bearer(scope["headers"])
        if _same(given, current.admin_api_key) or _same(given, current.warm_up_key):
            return None
        challenge = ((b"www-authenticate", b"Bearer"),)
        if self._is_admin(method, path, scope):
            if current.admin_api_key is None:
                message = (
                    f"{path} changes the server, which was started without an admin key: "
                    "start it with --admin-api-key-file or EAD_ADMIN_API_KEY"
                )
                return Refusal(403, message, "unauthorized")
            message = f"{path} needs the admin key (authorization: Bearer ...)"
            return Refusal(401, message, "unauthorized", headers=challenge)
        if current.api_key is None or _same(given, current.api_key):
            return None
        message = "a valid API key is needed (authorization: Bearer ...)"
        return Refusal(401, message, "unauthorized", headers=challenge)

    def _is_admin(self, method: str, path: str, scope: Any) -> bool:
        if self._admin_paths is None:
            self._admin_paths = frozenset(sglang_admin_paths(scope["app"].routes))
        return path in self._admin_paths or (method, path) in ADMIN_ROUTES

    # --- sizes -----------------------------------------------------------------------------

    async def _body(self, call: Call, scope: Any, receive: Receive) -> bytes | Refusal | None:
        """The request's body, or why it is refused; None when the client is gone."""
        limit = call.settings.max_body_bytes
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not (declared.isdigit() and int(declared) > limit):
            body = await read_body(receive, limit)
            if body is None:
                return None
            if len(body) <= limit:
                return await off_loop(len(body), _refused_nesting, body, scope) or body
        return Refusal(
            413,
            f"the request body must have at most {limit:,} bytes (--max-body-bytes)",
            "too_large",
            headers=((b"connection", b"close"),),  # what else arrives of it is not read
        )


def sglang_admin_paths(routes: Iterable[Any]) -> Iterable[str]:
    """Paths that SGLang marks with any of its admin levels; none of them has parameters."""
    from sglang.srt.utils.auth import AuthLevel

    for route in all_routes(routes):
        level = getattr(getattr(route, "endpoint", None), "_auth_level", AuthLevel.NORMAL)
        if level != AuthLevel.NORMAL:
            yield route.path


def _bearer(headers: Iterable[tuple[bytes, bytes]]) -> str:
    value = dict(headers).get(b"authorization", b"").decode("latin-1")
    scheme, _, key = value.partition(" ")
    return key if scheme.lower() == "bearer" else ""


def _same(given: str, key: str | None) -> bool:
    return key is not None and secrets.compare_digest(given.encode(), key.encode())


# --- what else is refused -------------------------------------------------------------------------


def _draining(call: Call, scope: Any) -> Refusal | None:
    """Between SIGTERM and the end, new work is turned away so that the old can finish.

    Not SGLang's own first requests: it kills the worker that does not get its answer, and with it
    what clients are waiting for, of a server that is told to end while it starts.
    """
    if call.method == "GET" or not state.draining():
        return None
    if call.path == "/continue_generation":  # without it, nobody that waits could be answered
        return None
    if _same(_bearer(scope["headers"]), call.settings.warm_up_key):
        return None
    headers = ((b"retry-after", b"5"), (b"connection", b"close"))
    return Refusal(503, "the server is shutting down", "draining", headers=headers)


def _incomplete(call: Call, *, is_admin: bool) -> Refusal | None:
    """After an update of the weights that broke off, nothing is generated until a whole one."""
    weights = served_weights()
    if weights is None or weights.broken is None or call.method in ("GET", "OPTIONS"):
        return None
    if call.path == "/continue_generation":
        return Refusal(409, str(weights.standstill), "weights")
    headers = ((b"retry-after", b"5"),)
    return None if is_admin else Refusal(503, str(weights.standstill), "weights", headers=headers)


def _refused_headers(scope: Any) -> Refusal | None:
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size <= MAX_HEADER_BYTES:
        return None
    message = f"URL and headers must have at most {MAX_HEADER_BYTES:,} bytes"
    return Refusal(431, message, "too_large", headers=((b"connection", b"close"),))


def _refused_nesting(body: bytes, scope: Any) -> Refusal | None:
    """Every route takes its body as JSON, whatever is said of it, but for uploaded files."""
    kind = dict(scope["headers"]).get(b"content-type", b"")
    if kind.startswith(b"multipart/") or nesting_of(body) <= MAX_NESTING:
        return None
    return Refusal(400, f"the body must be nested at most {MAX_NESTING} deep", "invalid")


def nesting_of(text: bytes) -> int:
    """How deeply JSON is nested; of what is no JSON, any number."""
    if text.count(b"[") + text.count(b"{") <= MAX_NESTING:  # nearly all: no need to look closer
        return 0
    plain = text.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2]  # what is in no string
    brackets = np.frombuffer(b"".join(plain).translate(None, delete=_NO_BRACKETS), np.uint8)
    opens = brackets & 2  # [ and { have this bit, ] and } have not
    return int(np.cumsum(opens.astype(np.int64) - 1).max(initial=0))


_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _refused_load(current: Settings, path: str, body: bytes) -> Refusal | None:
    if path in PICKLED:
        message = (
            f"{path} carries pickled data, which this server does not unpack: use "
            "/v1/weights/tensors, /v1/weights/disk or /v1/weights/distributed"
        )
        return Refusal(403, message, "weights")
    name = LOADED_FROM.get(path)
    if name is None:
        return None
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None  # SGLang says so
    value = request.get(name) if isinstance(request, dict) else None
    if not isinstance(value, str):
        return None
    if current.weights_root is None:
        message = f"{name}: this server loads no weights; start it with --weights-root FOLDER"
        return Refusal(403, message, "weights", name)
    folder, root = Path(os.path.realpath(value)), Path(os.path.realpath(current.weights_root))
    if not folder.is_relative_to(root):
        message = f"{name}: must be in the folder given as --weights-root, got {value!r:.200}"
        return Refusal(403, message, "weights", name)
    if request.get("load_format") not in (None, "auto", "safetensors"):
        message = "load_format: must be 'auto' or 'safetensors'"
        return Refusal(403, message, "weights", "load_format")
    if not any(folder.glob("*.safetensors")):  # SGLang falls back to unpickling .bin files
        message = f"{name}: must hold *.safetensors files, got {value!r:.200}"
        return Refusal(400, message, "weights", name)
    return _fatal_shape(folder) if path == "/update_weights_from_disk" else None


def _fatal_shape(folder: Path) -> Refusal | None:
    """SGLang dies of a tensor with another shape than the model's."""
    weights = served_weights()
    try:
        manifest = None if weights is None else weights.manifest
    except WeightsRefused:  # not known, of a quantised model
        manifest = None
    try:
        if manifest is not None:
            manifest.check_shapes(tensors_in(files_of(str(folder))))
    except WeightsRefused as refused:
        return Refusal(refused.status, str(refused), "weights", refused.param)
    return None


def _refused_template(body: bytes) -> Refusal | None:
    """Names that are no template's variables: SGLang would hand them to the tokenizer, which fails,
    or fills memory with padding."""
    if b"chat_template_kwargs" not in body:
        return None
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None  # SGLang says so
    kwargs = request.get("chat_template_kwargs") if isinstance(request, dict) else None
    for name in kwargs if isinstance(kwargs, dict) else ():
        if name in _tokenizers_own():
            field = f"chat_template_kwargs.{name}"
            return Refusal(400, f"{field}: is no variable of a template", "invalid", field)
    return None


@cache
def _tokenizers_own() -> frozenset[str]:
    from transformers import PreTrainedTokenizerBase

    names = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
    # a template's own, and one that SGLang refuses itself, unless --trust-request-chat-template
    return frozenset(names - {"kwargs", "documents", "chat_template"})


async def _refuse(send: Send, refusal: Refusal) -> None:
    kinds = {401: "authentication_error", 403: "permission_error"}
    kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
    kind = kinds.get(refusal.status, kind)
    error = openai_error(refusal.message, refusal.param, kind, refusal.status)
    await send_json(send, refusal.status, error, refusal.headers)


# --- the log ----------------------------------------------------------------------------------


def _tell(call: Call) -> None:
    """Count the request, and write its line."""
    if call.refused is None and call.status >= 400:
        call.refused = "invalid" if call.status < 500 else "error"
    if call.refused is not None:
        metrics.count_refused(call.refused)
    if call.settings.log_format == "off":
        return
    seconds, tokens = time.perf_counter() - call.started, sum(call.tokens.values())
    if call.settings.log_format == "json":
        facts = {
            "time": time.time(),
            "method": call.method,
            "path": call.path,
            "status": call.status or None,
            "seconds": round(seconds, 4),
            "bytes": call.bytes_out,
            "answers": call.answers,
            "tokens": tokens,
            "schedule": call.schedule,
            "refused": call.refused,
        }
        log.info(json.dumps(facts))
        return
    path = call.path.encode("unicode_escape").decode()[:200]  # one line, whatever was sent
    line = f"{time.strftime('%H:%M:%S')} {call.method} {path} {call.status or 'client left'}"
    line += f" {seconds:.2f} s"
    if call.answers:
        line += f", {call.answers} answer{'s' * (call.answers > 1)}, {tokens:,} tokens"
    if call.schedule:
        line += f", {call.schedule}"
    if call.refused:
        line += f", refused: {call.refused}"
    log.info(line)


def log_to_stderr() -> None:
    """Lines as they are, whatever SGLang sets up for its own."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
