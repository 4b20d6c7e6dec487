"""The clients. `_Calls` says what is sent and what an answer means; the rest is transport."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, TypeVar

import httpx

from ead_client._address import address_of, is_this_machine
from ead_client._checks import (
    ROLLOUTS,
    ChunkStream,
    GroupStream,
    check_status,
    checked_answer,
    json_object,
    transport_error,
    whole_rollouts,
)
from ead_client._clock import Clock
from ead_client._errors import ApiError, ConnectionFailed, EadError, TimedOut
from ead_client._json import to_json
from ead_client._rollouts import FRAMES, WHOLE, Group, Rollouts
from ead_client._servers import LIMITS, AsyncBalancedTransport, BalancedTransport
from ead_client._types import UNSAID, AnnealingDict, Answer, Chunk, Unsaid

Json = dict[str, Any]
Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
# Of a rollout request: texts, token ids, messages, or objects with metadata, prefix and own n.
Prompts = Sequence[str | Sequence[int] | Messages | Mapping[str, Any]]
# None: none, even where the server has a default schedule. Left out: as the server does by default
Annealing = AnnealingDict | Mapping[str, Any] | None
T = TypeVar("T")

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)  # seconds; a long answer takes minutes
_NOT_BEGUN = frozenset({429, 503})  # a server that answers so has not started
_REPEATED = _NOT_BEGUN | {502, 504}  # a proxy that answers so cannot tell
_JSON = {"content-type": "application/json"}
_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class _Calls:
    """What both clients share; no input or output."""

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        api_key: str | None,
        timeout: httpx.Timeout | float,
        deadline: float | None,
        retries: int,
        model: str,
        admin_api_key: str | None,
        compress: bool,
    ) -> None:
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        if not urls:
            raise ValueError("base_url: needs one server at least")
        self.base_urls = [address_of(url) for url in urls]
        self.base_url = self.base_urls[0]
        self.model = model
        self._retries = retries
        self._timeout = timeout if isinstance(timeout, httpx.Timeout) else httpx.Timeout(timeout)
        if deadline is not None and math.isnan(deadline):
            raise ValueError("deadline: must be a number of seconds, got nan")
        self._deadline = deadline
        # httpx would ask for compressed answers by itself
        headers = {"accept-encoding": "gzip" if compress else "identity", **_bearer(api_key)}
        self._admin_headers = _bearer(admin_api_key)
        several = len(urls) > 1  # whose transport puts the address in
        url = "http://servers" if several else self.base_url
        # proxies cannot reach this machine for us
        direct = {f"all://{httpx.URL(url).host}": None} if is_this_machine(url) else None
        self._options: Json = {
            "base_url": url,
            "timeout": self._timeout,
            "headers": headers,
            "limits": LIMITS,
            "mounts": direct,
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.base_urls))})"  # never the key

    def _headers(self, headers: Mapping[str, str] | None, *, admin: bool) -> dict[str, str]:
        if admin and len(self.base_urls) > 1:
            raise ValueError("admin: what changes a server goes to a Client of that server alone")
        return {**(headers or {}), **(self._admin_headers if admin else {})}

    def _completion_body(
        self, annealing: Annealing | Unsaid, rollout: bool | Mapping[str, bool], fields: Json
    ) -> Json:
        return {"model": self.model, **fields, **_asked(annealing, rollout)}

    def _chat_body(
        self,
        messages: Messages,
        annealing: Annealing | Unsaid,
        rollout: bool | Mapping[str, bool],
        fields: Json,
    ) -> Json:
        """Our fields go into `chat_template_kwargs`, which SGLang's router passes on."""
        body = {"model": self.model, "messages": list(messages), **fields}
        asked = _asked(annealing, rollout)
        if asked:
            body["chat_template_kwargs"] = {**(body.get("chat_template_kwargs") or {}), **asked}
        return body

    def _clock(self) -> Clock:
        return Clock(self._timeout, self._deadline)

    def _wait_before(self, attempt: int, clock: Clock) -> float:
        """Seconds before try number `attempt` (1 = the first retry): doubling, with jitter."""
        wait = min(0.25 * 2**attempt, 8.0) * random.uniform(0.5, 1.0)
        return min(wait, clock.left() or wait)

    def _check_retry(
        self, error: EadError, attempt: int, clock: Clock, *, repeatable: bool, once: bool
    ) -> None:
        """Raise unless sending again is safe: a call that changes nothing or has an idempotency
        key, one that never arrived (a refused connection), or one that the server refused to start.

        once: what was sent of the body is gone.
        """
        if clock.has_raised(error):
            raise error
        if isinstance(error, ApiError):
            again = error.status in (_REPEATED if repeatable else _NOT_BEGUN)
        else:
            unsent = isinstance(error.__cause__, _UNSENT)
            again = unsent or (repeatable and isinstance(error, ConnectionFailed | TimedOut))
        if clock.is_over and (again or isinstance(error, ConnectionFailed | TimedOut)):
            raise _late(error, clock)
        if once or not again or attempt >= self._retries:
            raise error
        clock.last = error

    def _request_of(
        self,
        http: httpx.Client | httpx.AsyncClient,
        method: str,
        path: str,
        content: Any,
        headers: Mapping[str, str],
        clock: Clock,
    ) -> httpx.Request:
        return http.build_request(
            method,
            path,
            content=content,
            headers=headers,
            timeout=clock.timeout(),
            extensions=clock.extensions,
        )

    def _rollouts_call(
        self,
        prompts: Prompts,
        sampling_params: Json,
        annealing: Annealing | Unsaid,
        accept: str,
        idempotency_key: str | None,
        **fields: Any,
    ) -> tuple[Json, dict[str, str]]:
        """Body and headers; `fields` are the request's own (n, entropies, texts)."""
        alone = isinstance(prompts, str | Mapping)  # one prompt, and not its letters or keys
        body: Json = {"prompts": [prompts] if alone else prompts, **fields}
        body |= _asked(annealing, False)
        headers = {"accept": accept}
        if idempotency_key:
            headers["idempotency-key"] = idempotency_key
        return {**body, "sampling_params": sampling_params}, headers


def _asked(annealing: Annealing | Unsaid, rollout: bool | Mapping[str, bool]) -> Json:
    """The fields of this project, where they say something."""
    asked: Json = {}
    if not isinstance(annealing, Unsaid):
        asked["annealing"] = None if annealing is None else dict(annealing)
    if rollout:
        asked["rollout"] = rollout if isinstance(rollout, bool) else dict(rollout)
    return asked


def _late(error: EadError, clock: Clock) -> TimedOut:
    """What to raise for an error that came when the deadline had passed."""
    clock.last = error
    return clock.over()


def _repeatable(method: str, headers: Mapping[str, str]) -> bool:
    keyed = any(name.lower() == "idempotency-key" for name in headers)
    return keyed or method.upper() in ("GET", "HEAD")


def _bearer(key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


class Client(_Calls):
    """Synchronous client. Use as a context manager, or call `close`.

    base_url: of one server, or of several, of which each call goes to the one with the fewest in
    progress, see `_servers`. timeout: seconds without a byte, or httpx.Timeout. deadline: seconds
    for a call with its connections, its retries and its whole answer. retries: further tries, with
    growing pauses, of what is safe to send again: reads, calls with an idempotency key, and calls
    that the server never began. model: as served. admin_api_key: for calls that change the server,
    see `request`. compress: rollouts come compressed, a quarter smaller: for slow networks, on
    others it takes longer than it saves.
    """

    def __init__(
        self,
        base_url: str | Sequence[str] = "http://127.0.0.1:30000",
        *,
        api_key: str | None = None,
        admin_api_key: str | None = None,
        timeout: httpx.Timeout | float = DEFAULT_TIMEOUT,
        deadline: float | None = None,
        retries: int = 3,
        model: str = "default",
        compress: bool = False,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(
            base_url,
            api_key=api_key,
            admin_api_key=admin_api_key,
            timeout=timeout,
            deadline=deadline,
            retries=retries,
            model=model,
            compress=compress,
        )
        if len(self.base_urls) > 1:
            transport = BalancedTransport(self.base_urls, transport)
        self._http = httpx.Client(transport=transport, **self._options)

    def chat(
        self,
        messages: Messages,
        *,
        annealing: Annealing | Unsaid = UNSAID,
        rollout: bool | Mapping[str, bool] = False,
        **fields: Any,
    ) -> Answer:
        """One chat request; `fields` are OpenAI's (n, max_tokens, stop, ...).

        annealing: the schedule; None: none, even where the server has a default one; left out: that
        default, if there is one.

        Raises ScheduleIgnored when the answer does not show the schedule, RequestRefused for a
        bad field, and the other errors of `ead_client`.
        """
        body = self._chat_body(messages, annealing, rollout, fields)
        return checked_answer(body, self.request("POST", CHAT, body))

    def complete(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        annealing: Annealing | Unsaid = UNSAID,
        rollout: bool | Mapping[str, bool] = False,
        **fields: Any,
    ) -> Answer:
        """Continue one or several prompts, each a text or token ids; n of each, in order."""
        body = self._completion_body(annealing, rollout, {"prompt": prompt, **fields})
        return checked_answer(body, self.request("POST", COMPLETIONS, body))

    def stream_chat(
        self,
        messages: Messages,
        *,
        annealing: Annealing | Unsaid = UNSAID,
        rollout: bool | Mapping[str, bool] = False,
        **fields: Any,
    ) -> Iterator[Chunk]:
        """The answer piece by piece; leaving the iteration ends the generation."""
        body = self._chat_body(messages, annealing, rollout, fields)
        clock = self._clock()
        check = ChunkStream(body, clock)
        with self.stream(CHAT, {**body, "stream": True}, clock=clock) as response:
            for data in response.iter_bytes():
                yield from check.feed(data)
        check.check_end()

    def rollouts(
        self,
        prompts: Prompts,
        *,
        n: int = 1,
        annealing: Annealing | Unsaid = UNSAID,
        entropies: bool = False,
        texts: bool = True,
        idempotency_key: str | None = None,
        **sampling_params: Any,
    ) -> Rollouts:
        """n answers to each prompt, in one call, with all that a trainer needs of each token.

        Prompts are texts, token ids, chat messages, or objects: {"text" | "messages" |
        "token_ids", "prefix_token_ids", "n", "metadata"}. sampling_params: SGLang's
        (max_new_tokens, stop, ...). One prompt's failure is its group's `error`; see
        `Rollouts.errors`. With an idempotency_key a lost connection is retried, and the server
        goes on where it was; without one, a lost connection ends the generation.
        """
        body, headers = self._rollouts_call(
            prompts,
            sampling_params,
            annealing,
            WHOLE,
            idempotency_key,
            n=n,
            entropies=entropies,
            texts=texts,
        )
        response = self.request("POST", ROLLOUTS, body, headers=headers)
        return whole_rollouts(body, response.content)

    def stream_rollouts(
        self,
        prompts: Prompts,
        *,
        n: int = 1,
        annealing: Annealing | Unsaid = UNSAID,
        entropies: bool = False,
        texts: bool = True,
        idempotency_key: str | None = None,
        **sampling_params: Any,
    ) -> Iterator[Group]:
        """The groups of `rollouts` as they complete, so that the first can be scored while others
        are generated. Leaving the iteration ends the generation, unless there is a key.
        """
        body, headers = self._rollouts_call(
            prompts,
            sampling_params,
            annealing,
            FRAMES,
            idempotency_key,
            n=n,
            entropies=entropies,
            texts=texts,
        )
        clock = self._clock()
        stream = GroupStream(body, clock)
        with self.stream(ROLLOUTS, body, headers, clock=clock) as response:
            for data in response.iter_bytes():
                yield from stream.feed(data)
        stream.check_end()

    @contextlib.contextmanager
    def stream(
        self,
        path: str,
        body: Json,
        headers: Mapping[str, str] | None = None,
        *,
        admin: bool = False,
        clock: Clock | None = None,
    ) -> Iterator[httpx.Response]:
        """POST to any route, for an answer that is read as it arrives; its status is checked, and
        what breaks it later raises EadError too. It is sent again as `request` does until an answer
        begins. admin: see `request`."""
        headers = {**_JSON, **self._headers(headers, admin=admin)}
        content, clock = to_json(body), clock or self._clock()
        repeatable = _repeatable("POST", headers)

        def attempt() -> httpx.Response:
            return self._opened("POST", path, content, headers, clock)

        response = self._tried(attempt, clock, repeatable=repeatable, once=False)
        try:
            with clock.watching(response):
                yield response
        except httpx.HTTPError as error:
            ours = transport_error(error)
            raise (_late(ours, clock) if clock.is_over else ours) from error
        finally:
            response.close()

    def request(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        content: Iterable[bytes] | bytes | None = None,
        repeatable: bool | None = None,
        admin: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Any route of the server. Raises EadError; see `retries`.

        body: JSON. content: in its place, bytes that are sent as they come, and once only.
        repeatable: whether doing it twice is harmless (default: for GET, and for what carries an
        idempotency key). admin: send the admin key, if there is one: for weights, schedule, step,
        pauses and aborts.
        """
        headers = self._headers(headers, admin=admin)
        if body is not None and content is None:
            content, headers = to_json(body), {**_JSON, **headers}
        once = content is not None and not isinstance(content, bytes)
        repeatable = _repeatable(method, headers) if repeatable is None else repeatable
        clock = self._clock()

        def attempt() -> httpx.Response:
            response = self._opened(method, path, content, headers, clock)
            try:
                with clock.watching(response):
                    response.read()
            except httpx.HTTPError as error:
                raise transport_error(error) from error
            finally:
                response.close()
            return response

        return self._tried(attempt, clock, repeatable=repeatable, once=once)

    def _tried(self, attempt: Callable[[], T], clock: Clock, *, repeatable: bool, once: bool) -> T:
        """The result of `attempt`, which is made again where that is safe."""
        tries = 0
        while True:
            try:
                return clock.bounded(attempt)
            except EadError as error:
                self._check_retry(error, tries, clock, repeatable=repeatable, once=once)
            tries += 1
            time.sleep(self._wait_before(tries, clock))

    def _opened(
        self, method: str, path: str, content: Any, headers: Mapping[str, str], clock: Clock
    ) -> httpx.Response:
        """An answer that has begun well, and is to be closed."""
        request = self._request_of(self._http, method, path, content, headers, clock)
        try:
            response = self._http.send(request, stream=True)
        except httpx.HTTPError as error:
            raise transport_error(error) from error
        if response.status_code >= 400:
            try:
                with clock.watching(response):
                    response.read()
                check_status(response)
            except httpx.HTTPError as error:
                raise transport_error(error) from error
            finally:
                response.close()
        return response

    def model_info(self) -> Json:
        """SGLang's /model_info: the model's path and the weight version now served."""
        return json_object(self.request("GET", "/model_info"))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(_Calls):
    """Asynchronous client: the same calls as `Client`, awaited."""

    def __init__(
        self,
        base_url: str | Sequence[str] = "http://127.0.0.1:30000",
        *,
        api_key: str | None = None,
        admin_api_key: str | None = None,
        timeout: httpx.Timeout | float = DEFAULT_TIMEOUT,
        deadline: float | None = None,
        retries: int = 3,
        model: str = "default",
        compress: bool = False,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(
            base_url,
            api_key=api_key,
            admin_api_key=admin_api_key,
            timeout=timeout,
            deadline=deadline,
            retries=retries,
            model=model,
            compress=compress,
        )
        if len(self.base_urls) > 1:
            transport = AsyncBalancedTransport(self.base_urls, transport)
        self._http = httpx.AsyncClient(transport=transport, **self._options)

    async def chat(
        self,
        messages: Messages,
        *,
        annealing: Annealing | Unsaid = UNSAID,
        rollout: bool | Mapping[str, bool] = False,
        **fields: Any,
    ) -> Answer:
        """See Client.chat."""
        body = self._chat_body(messages, annealing, rollout, fields)
        return checked_answer(body, await self.request("POST", CHAT, body))

    async def complete(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        annealing: Annealing | Unsaid = UNSAID,
        rollout: bool | Mapping[str, bool] = False,
        **fields: Any,
    ) -> Answer:
        """See Client.complete."""
        body = self._completion_body(annealing, rollout, {"prompt": prompt, **fields})
        return checked_answer(body, await self.request("POST", COMPLETIONS, body))

    async def stream_chat(
        self,
        messages: Messages,
        *,
        annealing: Annealing | Unsaid = UNSAID,
        rollout: bool | Mapping[str, bool] = False,
        **fields: Any,
    ) -> AsyncIterator[Chunk]:
        """See Client.stream_chat."""
        body = self._chat_body(messages, annealing, rollout, fields)
        clock = self._clock()
        check = ChunkStream(body, clock)
        async with self.stream(CHAT, {**body, "stream": True}, clock=clock) as response:
            async for data in response.aiter_bytes():
                for chunk in check.feed(data):
                    yield chunk
        check.check_end()

    async def rollouts(
        self,
        prompts: Prompts,
        *,
        n: int = 1,
        annealing: Annealing | Unsaid = UNSAID,
        entropies: bool = False,
        texts: bool = True,
        idempotency_key: str | None = None,
        **sampling_params: Any,
    ) -> Rollouts:
        """See Client.rollouts."""
        body, headers = self._rollouts_call(
            prompts,
            sampling_params,
            annealing,
            WHOLE,
            idempotency_key,
            n=n,
            entropies=entropies,
            texts=texts,
        )
        response = await self.request("POST", ROLLOUTS, body, headers=headers)
        return whole_rollouts(body, response.content)

    async def stream_rollouts(
        self,
        prompts: Prompts,
        *,
        n: int = 1,
        annealing: Annealing | Unsaid = UNSAID,
        entropies: bool = False,
        texts: bool = True,
        idempotency_key: str | None = None,
        **sampling_params: Any,
    ) -> AsyncIterator[Group]:
        """See Client.stream_rollouts."""
        body, headers = self._rollouts_call(
            prompts,
            sampling_params,
            annealing,
            FRAMES,
            idempotency_key,
            n=n,
            entropies=entropies,
            texts=texts,
        )
        clock = self._clock()
        stream = GroupStream(body, clock)
        async with self.stream(ROLLOUTS, body, headers, clock=clock) as response:
            async for data in response.aiter_bytes():
                for group in stream.feed(data):
                    yield group
        stream.check_end()

    @contextlib.asynccontextmanager
    async def stream(
        self,
        path: str,
        body: Json,
        headers: Mapping[str, str] | None = None,
        *,
        admin: bool = False,
        clock: Clock | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """See Client.stream."""
        headers = {**_JSON, **self._headers(headers, admin=admin)}
        content, clock = to_json(body), clock or self._clock()
        repeatable = _repeatable("POST", headers)

        async def attempt() -> httpx.Response:
            return await self._opened("POST", path, content, headers, clock)

        response = await self._tried(attempt, clock, repeatable=repeatable, once=False)
        try:
            yield response
        except httpx.HTTPError as error:
            ours = transport_error(error)
            raise (_late(ours, clock) if clock.is_over else ours) from error
        finally:
            await response.aclose()

    async def request(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        content: AsyncIterable[bytes] | bytes | None = None,
        repeatable: bool | None = None,
        admin: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """See Client.request."""
        headers = self._headers(headers, admin=admin)
        if body is not None and content is None:
            content, headers = to_json(body), {**_JSON, **headers}
        once = content is not None and not isinstance(content, bytes)
        repeatable = _repeatable(method, headers) if repeatable is None else repeatable
        clock = self._clock()

        async def attempt() -> httpx.Response:
            response = await self._opened(method, path, content, headers, clock)
            try:
                await response.aread()
            except httpx.HTTPError as error:
                raise transport_error(error) from error
            finally:
                await response.aclose()
            return response

        return await self._tried(attempt, clock, repeatable=repeatable, once=once)

    async def _tried(
        self, attempt: Callable[[], Awaitable[T]], clock: Clock, *, repeatable: bool, once: bool
    ) -> T:
        """The result of `attempt`, which is made again where that is safe."""
        tries = 0
        while True:
            try:
                return await clock.awaited(attempt())
            except EadError as error:
                self._check_retry(error, tries, clock, repeatable=repeatable, once=once)
            tries += 1
            await asyncio.sleep(self._wait_before(tries, clock))

    async def _opened(
        self, method: str, path: str, content: Any, headers: Mapping[str, str], clock: Clock
    ) -> httpx.Response:
        """An answer that has begun well, and is to be closed."""
        request = self._request_of(self._http, method, path, content, headers, clock)
        try:
            response = await self._http.send(request, stream=True)
        except httpx.HTTPError as error:
            raise transport_error(error) from error
        if response.status_code >= 400:
            try:
                await response.aread()
                check_status(response)
            except httpx.HTTPError as error:
                raise transport_error(error) from error
            finally:
                await response.aclose()
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = clock.each(response.stream)
        return response

    async def model_info(self) -> Json:
        """See Client.model_info."""
        return json_object(await self.request("GET", "/model_info"))

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
