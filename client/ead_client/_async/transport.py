"""The transport of a client of several servers; see `_servers`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

import httpx

from ead_client._servers import LIMITS, Server, Servers, has_whole_body


class AsyncBalancedTransport(httpx.AsyncBaseTransport):
    """For httpx.AsyncClient. urls: at least one."""

    def __init__(
        self, urls: Sequence[str], transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._servers = Servers(urls)
        self._transport = transport or httpx.AsyncHTTPTransport(limits=LIMITS)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The answer of the first server that gives one. Raises what the last one asked raises."""
        for server, is_last in self._servers.in_order(request):
            if not is_last and not await self._is_ready(server, request):
                continue
            end = self._servers.begin(server)
            try:
                response = await self._transport.handle_async_request(server.request(request))
            except BaseException as error:
                end()
                if self._servers.settles(server, request, error) or is_last:
                    raise
                continue
            assert isinstance(response.stream, httpx.AsyncByteStream)
            response.stream = _AsyncCountedStream(response.stream, end)
            if (
                self._servers.settles(server, request, response)
                or is_last
                or not has_whole_body(request)
            ):
                return response
            await response.aclose()
        raise AssertionError("the last server is always asked")

    async def _is_ready(self, server: Server, request: httpx.Request) -> bool:
        if not server.failures:
            return True
        if server.is_resting:
            return False
        try:
            response = await self._transport.handle_async_request(server.probe(request))
            await response.aclose()
        except httpx.HTTPError as error:
            self._servers.settles(server, request, error)
            return False
        return self._servers.settles(server, request, response)

    async def aclose(self) -> None:
        """Close the connections to all servers."""
        await self._transport.aclose()


class _AsyncCountedStream(httpx.AsyncByteStream):
    """An answer's body; the call is in progress until it is closed."""

    def __init__(self, stream: httpx.AsyncByteStream, end: Callable[[], None]) -> None:
        self._stream, self._end = stream, end

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part

    async def aclose(self) -> None:
        self._end()
        await self._stream.aclose()
