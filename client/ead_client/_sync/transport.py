# Generated from _async/transport.py by `python scripts/unasync.py`: edit that file instead.
"""The transport of a client of several servers; see `_servers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import httpx

from ead_client._servers import LIMITS, Server, Servers, has_whole_body


class BalancedTransport(httpx.BaseTransport):
    """For httpx.Client. urls: at least one."""

    def __init__(self, urls: Sequence[str], transport: httpx.BaseTransport | None = None) -> None:
        self._servers = Servers(urls)
        self._transport = transport or httpx.HTTPTransport(limits=LIMITS)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """The answer of the first server that gives one. Raises what the last one asked raises."""
        for server, is_last in self._servers.in_order(request):
            if not is_last and not self._is_ready(server, request):
                continue
            end = self._servers.begin(server)
            try:
                response = self._transport.handle_request(server.request(request))
            except BaseException as error:
                end()
                if self._servers.settles(server, request, error) or is_last:
                    raise
                continue
            assert isinstance(response.stream, httpx.SyncByteStream)
            response.stream = _CountedStream(response.stream, end)
            if (
                self._servers.settles(server, request, response)
                or is_last
                or not has_whole_body(request)
            ):
                return response
            response.close()
        raise AssertionError("the last server is always asked")

    def _is_ready(self, server: Server, request: httpx.Request) -> bool:
        if not server.failures:
            return True
        if server.is_resting:
            return False
        try:
            response = self._transport.handle_request(server.probe(request))
            response.close()
        except httpx.HTTPError as error:
            self._servers.settles(server, request, error)
            return False
        return self._servers.settles(server, request, response)

    def close(self) -> None:
        """Close the connections to all servers."""
        self._transport.close()


class _CountedStream(httpx.SyncByteStream):
    """An answer's body; the call is in progress until it is closed."""

    def __init__(self, stream: httpx.SyncByteStream, end: Callable[[], None]) -> None:
        self._stream, self._end = stream, end

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    def close(self) -> None:
        self._end()
        self._stream.close()
