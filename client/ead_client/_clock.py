"""The time of one call: a deadline holds for its tries, its connections and its whole answer.

`Clock` and `AsyncClock` have the same methods, for calls that block and for calls that are awaited:
these are the one part of the clients that is written twice, since a blocked thread cannot be
interrupted as a task can.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx

from ead_client.errors import EadError, TimedOut

T = TypeVar("T")

# one try of a call
Attempt = Callable[[], httpx.Response]
AsyncAttempt = Callable[[], Awaitable[httpx.Response]]

_LONGEST_S = 1e9  # what threads and sockets can wait for


class BaseClock:
    """deadline: seconds from now, or None: then only `timeout` holds, for each wait."""

    def __init__(self, timeout: httpx.Timeout, deadline: float | None) -> None:
        self._timeout = timeout
        self._deadline = deadline
        self._end = None if deadline is None else time.monotonic() + deadline
        self.last: EadError | None = None  # of the tries so far
        self._raised: list[TimedOut] = []  # at the deadline

    def timeout(self) -> httpx.Timeout:
        """For httpx: each wait ends at the deadline. Raises TimedOut after it."""
        left = self.left()
        if left is None:
            return self._timeout
        waits = {k: left if v is None else min(v, left) for k, v in self._timeout.as_dict().items()}
        return httpx.Timeout(**waits)

    def left(self) -> float | None:
        """Seconds. Raises TimedOut when there are none."""
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.expired()
        return min(left, _LONGEST_S)

    def expired(self, after: EadError | None = None) -> TimedOut:
        """The error that the deadline has passed, with what went wrong before it. after: what went
        wrong last, where that is not `last`."""
        self.last = after or self.last
        last = "" if self.last is None else f"; last: {type(self.last).__name__}: {self.last}"
        error = TimedOut(f"no whole answer within the deadline of {self._deadline:g} s{last}")
        self._raised.append(error)
        return error

    def has_raised(self, error: EadError) -> bool:
        """Whether it says that the deadline has passed."""
        return any(error is known for known in self._raised)

    @property
    def is_over(self) -> bool:
        """Whether there is a deadline, and it has passed."""
        return self._end is not None and time.monotonic() >= self._end

    @property
    def extensions(self) -> dict[str, Any]:
        """Of a request: for transports that try several servers, see `_servers`."""
        return {} if self._end is None else {"deadline": self._end}


class Clock(BaseClock):
    """For calls that block."""

    def sleep(self, seconds: float) -> None:
        """Wait before the next try."""
        time.sleep(seconds)

    def run(self, action: Callable[[], T]) -> T:
        """The result of `action`, or TimedOut at the deadline, whatever it waits for.

        A blocking call cannot be interrupted, so with a deadline it runs in a thread, which is
        left behind when the time is over. What that gives in the end is closed.
        """
        left = self.left()
        if left is None:
            return action()
        context, result = contextvars.copy_context(), Future[T]()

        def work() -> None:
            try:
                result.set_result(context.run(action))
            except BaseException as error:
                result.set_exception(error)

        threading.Thread(target=work, daemon=True, name="ead-client").start()
        try:
            return result.result(left)
        except BaseException as error:
            if result.done() and result.exception() is error:
                raise  # the action's own
            result.add_done_callback(_close_result)
            raise self.expired() if isinstance(error, TimeoutError) else error from None

    @contextlib.contextmanager
    def reading(self, response: httpx.Response) -> Iterator[None]:
        """Within it, reads of the answer end at the deadline: its connection is shut down."""
        left = self.left()
        stream = response.extensions.get("network_stream")
        if left is None or stream is None:
            yield
            return

        def end() -> None:
            connection = stream.get_extra_info("socket")
            if connection is not None and not response.is_closed:
                with contextlib.suppress(OSError):
                    # not TLS's own shutdown, which would talk to the other side first
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)

        timer = threading.Timer(left, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _close_result(result: Future[Any]) -> None:
    with contextlib.suppress(BaseException):
        result.result().close()


class AsyncClock(BaseClock):
    """For calls that are awaited."""

    async def sleep(self, seconds: float) -> None:
        """Wait before the next try."""
        await asyncio.sleep(seconds)

    async def run(self, action: Callable[[], Awaitable[T]]) -> T:
        """The result of `action`, or TimedOut at the deadline, whatever it waits for."""
        limit = asyncio.timeout(self.left())
        try:
            async with limit:
                return await action()
        except TimeoutError:
            if limit.expired():
                raise self.expired() from None
            raise

    @contextlib.contextmanager
    def reading(self, response: httpx.Response) -> Iterator[None]:
        """Within it, reads of the answer end at the deadline: each part must come before it."""
        if self._end is not None:
            assert isinstance(response.stream, httpx.AsyncByteStream)
            response.stream = _BoundedStream(response.stream, self)
        yield


class _BoundedStream(httpx.AsyncByteStream):
    """A body, each part of which must come before the deadline."""

    def __init__(self, stream: httpx.AsyncByteStream, clock: AsyncClock) -> None:
        self._stream, self._clock = stream, clock

    async def __aiter__(self) -> AsyncIterator[bytes]:
        parts = aiter(self._stream)
        while True:
            try:
                part = await self._clock.run(parts.__anext__)
            except StopAsyncIteration:
                return
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()
