"""`ead serve`'s edge: an ASGI middleware, outside everything else.

It asks the modules that know: `headers`, `keys`, `bodies`, `weights`. A server that SGLang's own
launcher started has no settings, and this lets everything through.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson

from ead_server import settings
from ead_server.asgi import (
    Message,
    Receive,
    Send,
    off_loop,
    read_body,
    replay,
    route_of,
)
from ead_server.calls import Call, current_call, record
from ead_server.edge import bodies, memory
from ead_server.edge.headers import UPLOADS, is_preflight, refused_headers
from ead_server.edge.keys import (
    ADMIN_ROUTES,
    OPEN,
    bearer,
    has_key,
    is_key,
    refused_key,
    sglang_admin_paths,
)
from ead_server.error_answers import OpenAIErrors, send_refusal
from ead_server.errors import CLOSE, LATER, RequestRefused, WeightsRefused
from ead_server.lifecycle import state
from ead_server.lifecycle.shutdown import call_in_progress, from_start_to_end
from ead_server.settings import Settings
from ead_server.weights.folders import check_numbers, open_folder
from ead_server.weights.update import served_weights

# bodies that are worked on as they come, whatever their size
STREAMED = ("/v1/weights/tensors", "/v1/weights/adapters")
_OURS = "use /v1/weights/tensors, /v1/weights/disk or /v1/weights/distributed"
_PICKLED = f"carries pickled data, which this server does not unpack: {_OURS}"
_UNCHECKED = f"could leave weights that are incomplete or no numbers: {_OURS}"
CLOSED = {  # whoever calls
    "/update_weights_from_tensor": _PICKLED,
    "/update_weights_from_ipc": _PICKLED,
    "/load_lora_adapter_from_tensors": _PICKLED,
    "/begin_weight_update": _UNCHECKED,
    "/update_weights_from_distributed": _UNCHECKED,
    "/end_weight_update": _UNCHECKED,
}
LOADED_FROM = {
    "/v1/weights/disk": "folder",
    "/update_weights_from_disk": "model_path",
    "/load_lora_adapter": "lora_path",
}


class Guard:
    """See the module's docstring."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self._admin_paths: frozenset[str] | None = None

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        current, path = settings.current(), route_of(scope)
        if current is not None and scope["type"] == "lifespan":
            await self.app(scope, from_start_to_end(receive), send)
        elif current is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            if self._refused(current, "GET", path, scope) is not None:
                await send({"type": "websocket.close", "code": 1008})
                return
            token = current_call.set(Call("GET", path, current))
            try:
                await self.app(scope, receive, send)
            finally:
                current_call.reset(token)
        elif path in OPEN and scope["method"] in ("GET", "HEAD"):
            if path == "/ready":  # SGLang's own remembers one failed health check
                scope = {**scope, "path": scope["path"].removesuffix(path) + "/health/ready"}
            await self.app(scope, replay(b"", receive), send)
        elif is_key(bearer(scope["headers"]), current.warm_up_key):
            await self._http(current, path, scope, receive, send)
        else:
            with call_in_progress():
                await self._http(current, path, scope, receive, send)

    async def _http(
        self, current: Settings, path: str, scope: Any, receive: Receive, send: Send
    ) -> None:
        call = Call(scope["method"], path, current)

        async def heard() -> Message:
            message = await receive()
            call.left = call.left or message["type"] == "http.disconnect"
            return message

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
            call.bytes_out += len(message.get("body", b""))
            await send(message)

        token = current_call.set(call)
        try:
            if is_preflight(scope):
                await self.app(scope, replay(b"", receive), observed)
                return
            body: bytes | RequestRefused | None = (
                self._refused(current, call.method, path, scope)
                or _draining(call, scope)
                or _incomplete(call, scope, is_admin=self._is_admin(call.method, path, scope))
                or (b"" if path in STREAMED else await self._body(call, scope, receive))
            )
            if isinstance(body, bytes):
                body = (
                    _draining(call, scope)  # it may have been long on its way
                    or await _refused_load(current, path, body)
                    or body
                )
            if isinstance(body, RequestRefused):
                call.refused = body.reason
                await send_refusal(observed, body)
            elif body is not None:
                given = heard if path in STREAMED else replay(body, heard)
                await self.app(scope, given, OpenAIErrors(observed))
        except Exception as error:
            bad = call.bad_value if isinstance(error, ValueError) else None
            if not call.status:
                message = bad or "an error in the server, told in its log"
                status, reason = (400, "invalid") if bad else (500, "error")
                reason = call.refused or reason
                await send_refusal(observed, RequestRefused(message, status=status, reason=reason))
            if not bad:  # a route of SGLang's that leaves bad values uncaught is no news
                raise
        finally:
            current_call.reset(token)
            record(call)
            memory.give_back_after(call.bytes_in + call.bytes_out)

    def _refused(
        self, current: Settings, method: str, path: str, scope: Any
    ) -> RequestRefused | None:
        """For what is told before the body."""
        is_admin = self._is_admin(method, path, scope)
        key = refused_key(current, path, scope, is_admin=is_admin)
        known = has_key(current, scope["headers"])
        return refused_headers(current, path, scope, has_key=known) or key

    def _is_admin(self, method: str, path: str, scope: Any) -> bool:
        if self._admin_paths is None:
            self._admin_paths = frozenset(sglang_admin_paths(scope["app"].routes))
        return path in self._admin_paths or (method, path) in ADMIN_ROUTES

    async def _body(
        self, call: Call, scope: Any, receive: Receive
    ) -> bytes | RequestRefused | None:
        """The request's body, or why it is refused; None when the client is gone."""
        limit = call.settings.max_body_bytes
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not (declared.isdigit() and int(declared) > limit):
            body = await read_body(receive, limit)
            if body is None:
                return None
            call.bytes_in = len(body)
            if len(body) <= limit:
                is_admin = self._is_admin(call.method, call.path, scope)
                return await off_loop(len(body), _refused_body, call.path, body, is_admin) or body
        message = f"the request body must have at most {limit:,} bytes (--max-body-bytes)"
        return RequestRefused(message, status=413, reason="too_large", headers=CLOSE)


def _refused_body(path: str, body: bytes, is_admin: bool) -> RequestRefused | None:
    if path in UPLOADS:
        return None
    shape = bodies.refused_shape(body, path, is_admin=is_admin)
    if shape is not None:
        return shape
    # one prompt of /v1/rollouts that is too long is that prompt's error alone
    by_prompt = is_admin or path == "/v1/rollouts"
    return bodies.refused_content(body, None if by_prompt else bodies.max_text(state.manager()))


def _draining(call: Call, scope: Any) -> RequestRefused | None:
    """Between SIGTERM and the end, new work is turned away so that the old can finish.

    Not SGLang's own first requests: it kills the worker that does not get its answer, and with it
    what clients are waiting for, of a server that is told to end while it starts.
    """
    if call.method == "GET" or not state.draining():
        return None
    if call.path == "/continue_generation":  # without it, nobody that waits could be answered
        return None
    if is_key(bearer(scope["headers"]), call.settings.warm_up_key):
        return None
    message = "the server is shutting down"
    headers = (*LATER, *CLOSE)
    return RequestRefused(message, status=503, reason="draining", headers=headers)


def _incomplete(call: Call, scope: Any, *, is_admin: bool) -> RequestRefused | None:
    """After an update of the weights that broke off, nothing is generated until a whole one."""
    weights = served_weights()
    if weights is None or weights.broken is None or call.method in ("GET", "OPTIONS"):
        return None
    if call.path == "/continue_generation":
        return RequestRefused(str(weights.standstill), status=409, reason="weights")
    told = has_key(call.settings, scope["headers"])
    message = str(weights.standstill) if told else state.in_short(str(weights.standstill))
    if is_admin:
        return None
    return RequestRefused(message, status=503, reason="weights", headers=LATER)


async def _refused_load(current: Settings, path: str, body: bytes) -> RequestRefused | None:
    if path in CLOSED:
        return RequestRefused(f"{path} {CLOSED[path]}", status=403, reason="weights")
    name = LOADED_FROM.get(path)
    if name is None:
        return None
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:  # another parser might see something in it
        return RequestRefused(f"the request body is not valid JSON: {error}")
    value = request.get(name) if isinstance(request, dict) else None
    if not isinstance(value, str):
        return None
    if current.weights_root is None:
        message = f"{name}: this server loads no weights; start it with --weights-root FOLDER"
        return RequestRefused(message, status=403, reason="weights", field=name)
    if request.get("load_format") not in (None, "auto", "safetensors"):
        message = "load_format: must be 'auto' or 'safetensors'"
        return RequestRefused(message, status=403, reason="weights", field="load_format")
    if path == "/load_lora_adapter":  # the others' files are checked by Weights
        try:
            await asyncio.to_thread(_check_adapter, value, current.weights_root, name)
        except WeightsRefused as refused:
            return refused
    return None


def _check_adapter(folder: str, root: Path, field: str) -> None:
    check_numbers(open_folder(folder, root, field).files, {})
