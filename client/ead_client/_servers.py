"""Several servers behind one client: each call goes to the one with the fewest calls in progress.

A server that refuses a connection, or says that it is not ready, gets no calls for a while, twice
as long each time, and then none before its /health/ready has answered. A call that a server never
began goes on to the next at once. Calls with an idempotency key go to the same server each time,
as long as it is there: only it knows the key.
"""

from __future__ import annotations

import errno
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
_PROBE_TIMEOUT_S = 2.0
# too many open files here, or no local port left
_OWN_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL)
# Connections follow the calls: those that wait for one would time out before they are sent.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None)


@dataclass(eq=False)
class _Server:
    url: httpx.URL
    calls: int = 0  # in progress
    failures: int = 0  # in a row
    back_at: float = 0.0  # time.monotonic(), after failures

    def request(self, request: httpx.Request) -> httpx.Request:
        """The same request, to this server. Its body is kept, not read."""
        url = self._below(request.url.raw_path)
        others = [(k, v) for k, v in request.headers.raw if k.lower() != b"host"]
        return httpx.Request(
            request.method,
            url,
            headers=[(b"host", url.netloc), *others],
            stream=request.stream,
            extensions=_until_deadline(request, request.extensions.get("timeout", {})),
        )

    def probe(self, request: httpx.Request) -> httpx.Request:
        """Whether it is ready for that request."""
        timeout = httpx.Timeout(_PROBE_TIMEOUT_S).as_dict()
        url = self._below(b"/health/ready")
        return httpx.Request("GET", url, extensions=_until_deadline(request, timeout))

    def _below(self, path: bytes) -> httpx.URL:
        return self.url.copy_with(raw_path=self.url.raw_path.rstrip(b"/") + path)


def _until_deadline(request: httpx.Request, timeout: Mapping[str, float | None]) -> dict[str, Any]:
    """The request's extensions, with these waits as far as its deadline allows them. Raises
    ConnectTimeout after it, so that no server is asked for what nobody waits for."""
    end = request.extensions.get("deadline")
    if end is None:
        return {**request.extensions, "timeout": dict(timeout)}
    left = end - time.monotonic()
    if left <= 0:
        raise httpx.ConnectTimeout("the deadline passed before a server was found", request=request)
    waits = {name: left if wait is None else min(wait, left) for name, wait in timeout.items()}
    return {**request.extensions, "timeout": waits}


def _is_servers_own(error: BaseException, request: httpx.Request) -> bool:
    """Whether it says something of the server: not that this client's time or its means ended."""
    end = request.extensions.get("deadline")
    if end is not None and end <= time.monotonic():
        return False
    if not isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError | httpx.ConnectTimeout):
        return False
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _OWN_ERRNOS:
            return False
        cause = cause.__cause__ or cause.__context__
    return True


class _Servers:
    """Who is asked next. Safe among threads."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._servers = [_Server(httpx.URL(url)) for url in urls]
        self._lock = threading.Lock()
        self._turn = 0

    def in_order(self, request: httpx.Request) -> Iterator[tuple[_Server, bool]]:
        """Those to try, the best first, and whether it is the last: one that failed lately is
        asked only when no other is left."""
        with self._lock:
            self._turn += 1
            key = request.headers.get("idempotency-key")
            start = self._turn if key is None else zlib.crc32(key.encode())
            count = len(self._servers)
            turn = [self._servers[(start + i) % count] for i in range(count)]
        now = time.monotonic()
        turn.sort(key=lambda s: (s.back_at > now, s.calls if key is None else 0))
        return zip(turn, [False] * (count - 1) + [True], strict=True)

    def begin(self, server: _Server) -> Callable[[], None]:
        """Count a call. What is returned ends it; to call that again does nothing."""
        with self._lock:
            server.calls += 1
        open_calls = [server]

        def end() -> None:
            with self._lock:
                if open_calls:
                    open_calls.pop().calls -= 1

        return end

    @staticmethod
    def is_taken(
        server: _Server, request: httpx.Request, found: httpx.Response | BaseException
    ) -> bool:
        """Note how a call went. Whether that is the answer, and not for the next server to give."""
        if isinstance(found, httpx.Response) and found.status_code != 503:
            server.failures, server.back_at = 0, 0.0
            return True
        if isinstance(found, httpx.Response) or _is_servers_own(found, request):
            server.failures += 1
            pause = min(_FIRST_PAUSE_S * 2 ** (server.failures - 1), _LONGEST_PAUSE_S)
            server.back_at = time.monotonic() + pause
        return not isinstance(found, httpx.Response | httpx.ConnectError | httpx.ConnectTimeout)


def _repeatable(request: httpx.Request) -> bool:
    """Whether its body can be sent once more."""
    return isinstance(request.stream, httpx.ByteStream)


class BalancedTransport(httpx.BaseTransport):
    """For httpx.Client; see the module. urls: at least one."""

    def __init__(self, urls: Sequence[str], transport: httpx.BaseTransport | None = None) -> None:
        self._servers = _Servers(urls)
        self._transport = transport or httpx.HTTPTransport(limits=LIMITS)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        for server, is_last in self._servers.in_order(request):
            if not is_last and not self._is_ready(server, request):
                continue
            end = self._servers.begin(server)
            try:
                response = self._transport.handle_request(server.request(request))
            except BaseException as error:
                end()
                if self._servers.is_taken(server, request, error) or is_last:
                    raise
                continue
            assert isinstance(response.stream, httpx.SyncByteStream)
            response.stream = _Counted(response.stream, end)
            if (
                self._servers.is_taken(server, request, response)
                or is_last
                or not _repeatable(request)
            ):
                return response
            response.close()
        raise AssertionError("the last server is always asked")

    def _is_ready(self, server: _Server, request: httpx.Request) -> bool:
        if not server.failures:
            return True
        if server.back_at > time.monotonic():
            return False
        try:
            response = self._transport.handle_request(server.probe(request))
            response.close()
        except httpx.HTTPError as error:
            self._servers.is_taken(server, request, error)
            return False
        return self._servers.is_taken(server, request, response)

    def close(self) -> None:
        self._transport.close()


class _Counted(httpx.SyncByteStream):
    """An answer's body; the call is in progress until it is closed."""

    def __init__(self, stream: httpx.SyncByteStream, end: Callable[[], None]) -> None:
        self._stream, self._end = stream, end

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._stream)

    def close(self) -> None:
        self._end()
        self._stream.close()


class AsyncBalancedTransport(httpx.AsyncBaseTransport):
    """For httpx.AsyncClient; as BalancedTransport."""

    def __init__(
        self, urls: Sequence[str], transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._servers = _Servers(urls)
        self._transport = transport or httpx.AsyncHTTPTransport(limits=LIMITS)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        for server, is_last in self._servers.in_order(request):
            if not is_last and not await self._is_ready(server, request):
                continue
            end = self._servers.begin(server)
            try:
                response = await self._transport.handle_async_request(server.request(request))
            except BaseException as error:
                end()
                if self._servers.is_taken(server, request, error) or is_last:
                    raise
                continue
            assert isinstance(response.stream, httpx.AsyncByteStream)
            response.stream = _AsyncCounted(response.stream, end)
            if (
                self._servers.is_taken(server, request, response)
                or is_last
                or not _repeatable(request)
            ):
                return response
            await response.aclose()
        raise AssertionError("the last server is always asked")

    async def _is_ready(self, server: _Server, request: httpx.Request) -> bool:
        if not server.failures:
            return True
        if server.back_at > time.monotonic():
            return False
        try:
            response = await self._transport.handle_async_request(server.probe(request))
            await response.aclose()
        except httpx.HTTPError as error:
            self._servers.is_taken(server, request, error)
            return False
        return self._servers.is_taken(server, request, response)

    async def aclose(self) -> None:
        await self._transport.aclose()


class _AsyncCounted(httpx.AsyncByteStream):
    """As _Counted."""

    def __init__(self, stream: httpx.AsyncByteStream, end: Callable[[], None]) -> None:
        self._stream, self._end = stream, end

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part

    async def aclose(self) -> None:
        self._end()
        await self._stream.aclose()
