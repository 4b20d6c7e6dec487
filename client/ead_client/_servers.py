"""Several servers behind one client: each call goes to the one with the fewest calls in progress.

A server that refuses a connection, or says that it is not ready, gets no calls for a while, twice
as long each time, and then none before its /health/ready has answered. A call that a server never
began goes on to the next at once. Calls with an idempotency key go to the same server each time,
as long as it is there: only it knows the key.

Here is who is asked, and what an outcome means; the transports that ask are in `_async.transport`.
"""

from __future__ import annotations

import errno
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
_PROBE_TIMEOUT_S = 2.0
# too many open files here, or no local port left
_LOCAL_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL)
# Connections follow the calls: those that wait for one would time out before they are sent.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None)


@dataclass(eq=False)
class Server:
    """One of several, and how it has fared."""

    url: httpx.URL
    calls: int = 0  # in progress
    failures: int = 0  # in a row
    back_at: float = 0.0  # time.monotonic(), after failures

    @property
    def is_resting(self) -> bool:
        """Whether it failed so lately that it gets no calls."""
        return self.back_at > time.monotonic()

    def request(self, request: httpx.Request) -> httpx.Request:
        """The same request, to this server. Its body is kept, not read."""
        url = self._below(request.url.raw_path)
        others = [(k, v) for k, v in request.headers.raw if k.lower() != b"host"]
        return httpx.Request(
            request.method,
            url,
            headers=[(b"host", url.netloc), *others],
            stream=request.stream,
            extensions=_bounded_extensions(request, request.extensions.get("timeout", {})),
        )

    def probe(self, request: httpx.Request) -> httpx.Request:
        """Whether it is ready for that request."""
        timeout = httpx.Timeout(_PROBE_TIMEOUT_S).as_dict()
        url = self._below(b"/health/ready")
        return httpx.Request("GET", url, extensions=_bounded_extensions(request, timeout))

    def _below(self, path: bytes) -> httpx.URL:
        return self.url.copy_with(raw_path=self.url.raw_path.rstrip(b"/") + path)


def _bounded_extensions(
    request: httpx.Request, timeout: Mapping[str, float | None]
) -> dict[str, Any]:
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


def _is_servers_fault(error: BaseException, request: httpx.Request) -> bool:
    """Whether it says something of the server: not that this client's time or its means ended."""
    end = request.extensions.get("deadline")
    if end is not None and end <= time.monotonic():
        return False
    if not isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError | httpx.ConnectTimeout):
        return False
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _LOCAL_ERRNOS:
            return False
        cause = cause.__cause__ or cause.__context__
    return True


class Servers:
    """Who is asked next. Safe among threads."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._servers = [Server(httpx.URL(url)) for url in urls]
        self._lock = threading.Lock()
        self._turn = 0

    def in_order(self, request: httpx.Request) -> Iterator[tuple[Server, bool]]:
        """Those to try, the best first, and whether it is the last: one that failed lately is
        asked only when no other is left."""
        with self._lock:
            self._turn += 1
            key = request.headers.get("idempotency-key")
            start = self._turn if key is None else zlib.crc32(key.encode())
            count = len(self._servers)
            turn = [self._servers[(start + i) % count] for i in range(count)]
        turn.sort(key=lambda s: (s.is_resting, s.calls if key is None else 0))
        return zip(turn, [False] * (count - 1) + [True], strict=True)

    def begin(self, server: Server) -> Callable[[], None]:
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
    def settles(
        server: Server, request: httpx.Request, outcome: httpx.Response | BaseException
    ) -> bool:
        """Note how a call went. Whether that is the answer, and not for the next server to give."""
        if isinstance(outcome, httpx.Response) and outcome.status_code != 503:
            server.failures, server.back_at = 0, 0.0
            return True
        if isinstance(outcome, httpx.Response) or _is_servers_fault(outcome, request):
            server.failures += 1
            pause = min(_FIRST_PAUSE_S * 2 ** (server.failures - 1), _LONGEST_PAUSE_S)
            server.back_at = time.monotonic() + pause
        return not isinstance(outcome, httpx.Response | httpx.ConnectError | httpx.ConnectTimeout)


def has_whole_body(request: httpx.Request) -> bool:
    """Whether its body can be sent once more."""
    return isinstance(request.stream, httpx.ByteStream)
