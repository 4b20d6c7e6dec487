"""The few pieces of ASGI that the middlewares and the routes need."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, TypeVar

import orjson

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Result = TypeVar("Result")

LARGE = 256 << 10  # bytes of JSON, which take about a millisecond to read or write


def route_of(scope: Any) -> str:
    """The path below a proxy's prefix (--fastapi-root-path); empty for what has none."""
    path, root = str(scope.get("path", "")), str(scope.get("root_path", ""))
    below = path.removeprefix(root)
    return below if root and below != path and below[:1] in ("", "/") else path


def all_routes(routes: Iterable[Any]) -> Iterator[Any]:
    """Also those of included routers, which FastAPI keeps as one (since 0.16x)."""
    for route in routes:
        included = getattr(route, "original_router", None)
        if included is None:
            yield route
        else:
            yield from all_routes(included.routes)


async def read_body(receive: Receive, limit: int | None = None) -> bytes | None:
    """The request's body; None when the client is gone. Stops reading above `limit` bytes."""
    chunks, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if not message.get("more_body", False) or (limit is not None and size > limit):
            return b"".join(chunks)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` once and then whatever the client does next."""
    pending = [body]

    async def replayed() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return replayed


async def send_json(
    send: Send, status: int, content: Any, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """A whole JSON answer. Lengths and types in `headers` are replaced."""
    body = orjson.dumps(content)
    replaced = (b"content-length", b"content-type")
    kept = [(name, value) for name, value in headers if name.lower() not in replaced]
    kept += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": kept})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def off_loop(size: int, function: Callable[..., Result], *arguments: Any) -> Result:
    """`function(*arguments)`, in a thread if it works on many bytes: other clients are answered
    meanwhile, at least between its calls of C, which keep Python's lock."""
    if size < LARGE:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)
