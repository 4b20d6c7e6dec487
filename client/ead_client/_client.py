"""The clients. `_Calls` says what is sent and what an answer means; the rest is transport."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import httpx
import numpy as np
from pydantic import ValidationError

from ead_client._address import address_of
from ead_client._errors import (
    ApiError,
    ConnectionFailed,
    EadError,
    MalformedAnswer,
    RequestRefused,
    ScheduleIgnored,
    ServerUnavailable,
    TimedOut,
)
from ead_client._rollouts import FRAMES, WHOLE, Frames, Group, Rollouts, unpack
from ead_client._servers import AsyncBalancedTransport, BalancedTransport
from ead_client._types import AnnealingDict, Answer, Chunk

Json = dict[str, Any]
Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
# Of a rollout request: texts, token ids, messages, or objects with metadata, prefix and own n.
Prompts = Sequence[str | Sequence[int] | Messages | Mapping[str, Any]]
Annealing = AnnealingDict | Mapping[str, Any] | None
AnswerT = TypeVar("AnswerT", Answer, Chunk)

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ROLLOUTS = "/v1/rollouts"
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)  # seconds; a long answer takes minutes
_RETRIED_STATUS = frozenset({429, 502, 503, 504})


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
        self._deadline = deadline
        # httpx would ask for compressed answers by itself
        headers = {"accept-encoding": "gzip" if compress else "identity", **_bearer(api_key)}
        self._admin_headers = _bearer(admin_api_key)
        several = len(urls) > 1  # whose transport puts the address in
        url = "http://servers" if several else self.base_url
        self._options: Json = {"base_url": url, "timeout": self._timeout, "headers": headers}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.base_urls))})"  # never the key

    def _headers(self, headers: Mapping[str, str] | None, *, admin: bool) -> dict[str, str]:
        if admin and len(self.base_urls) > 1:
            raise ValueError("admin: what changes a server goes to a Client of that server alone")
        return {**(headers or {}), **(self._admin_headers if admin else {})}

    def _completion_body(
        self, annealing: Annealing, rollout: bool | Mapping[str, bool], fields: Json
    ) -> Json:
        return {"model": self.model, **fields, **_asked(annealing, rollout)}

    def _chat_body(
        self,
        messages: Messages,
        annealing: Annealing,
        rollout: bool | Mapping[str, bool],
        fields: Json,
    ) -> Json:
        """Our fields go into `chat_template_kwargs`, which SGLang's router passes on."""
        body = {"model": self.model, "messages": list(messages), **fields}
        asked = _asked(annealing, rollout)
        if asked:
            body["chat_template_kwargs"] = {**(body.get("chat_template_kwargs") or {}), **asked}
        return body

    def _clock(self) -> _Clock:
        return _Clock(self._timeout, self._deadline)

    def _wait_before(self, attempt: int, clock: _Clock) -> float:
        """Seconds before try number `attempt` (1 = the first retry): doubling, with jitter."""
        wait = min(0.25 * 2**attempt, 8.0) * random.uniform(0.5, 1.0)
        return min(wait, clock.left() or wait)

    def _may_retry(self, error: EadError, attempt: int, *, repeatable: bool) -> bool:
        """Whether sending again is safe: a call that changes nothing, one that never arrived
        (a refused connection), or one that the server refused to start."""
        if attempt >= self._retries:
            return False
        if isinstance(error, ConnectionFailed):
            return repeatable or isinstance(error.__cause__, httpx.ConnectError)
        if isinstance(error, TimedOut):
            return repeatable or isinstance(error.__cause__, httpx.ConnectTimeout)
        return isinstance(error, ApiError) and error.status in _RETRIED_STATUS

    def _rollouts_call(
        self,
        prompts: Prompts,
        sampling_params: Json,
        annealing: Annealing,
        accept: str,
        idempotency_key: str | None,
        **fields: Any,
    ) -> tuple[Json, dict[str, str]]:
        """Body and headers; `fields` are the request's own (n, entropies, texts)."""
        alone = isinstance(prompts, str | Mapping)  # one prompt, and not its letters or keys
        body: Json = {"prompts": _plain([prompts] if alone else prompts), **fields}
        if annealing is not None:
            body["annealing"] = dict(annealing)
        headers = {"accept": accept}
        if idempotency_key:
            headers["idempotency-key"] = idempotency_key
        return {**body, "sampling_params": _plain(sampling_params)}, headers


class _Clock:
    """The time of one call, its retries and its whole answer. deadline: seconds, or None."""

    def __init__(self, timeout: httpx.Timeout, deadline: float | None) -> None:
        self._timeout = timeout
        self._deadline = deadline
        self._end = None if deadline is None else time.monotonic() + deadline

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
            raise TimedOut(f"no whole answer within the deadline of {self._deadline:g} s")
        return left


def _plain(value: Any) -> Any:
    """For JSON: arrays, as answers have them, as lists."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and not (value and type(value[0]) is int):
        return [_plain(item) for item in value]
    return value


def _asked(annealing: Annealing, rollout: bool | Mapping[str, bool]) -> Json:
    """The fields of this project, where they say something."""
    asked: Json = {}
    if annealing is not None:
        asked["annealing"] = dict(annealing)
    if rollout:
        asked["rollout"] = rollout if isinstance(rollout, bool) else dict(rollout)
    return asked


def _bearer(key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


def _checked_groups(body: Json, groups: list[Group]) -> list[Group]:
    """The groups, whose answers must show that the schedule was honoured."""
    for group in groups:
        for answer in group.answers:
            if answer.error is None:
                honoured = answer.rollout is not None and answer.rollout.annealing is not None
                _check_marker(body, honoured, True)
    return groups


def _whole_rollouts(body: Json, data: bytes) -> Rollouts:
    about, groups = unpack(data)
    if "id" not in about:
        raise MalformedAnswer(f"not rollouts: {about!r:.200}")
    return Rollouts(
        id=about["id"],
        model=about["model"],
        usage=about["usage"],
        groups=_checked_groups(body, groups),
    )


class _GroupStream:
    """Reads frames into groups, and knows whether the stream came to its end."""

    def __init__(self, body: Json, clock: _Clock) -> None:
        self._body = body
        self._clock = clock
        self._frames = Frames()
        self._ended = False

    def feed(self, data: bytes) -> Iterator[Group]:
        self._clock.left()
        for frame in self._frames.feed(data):
            about, groups = unpack(frame)
            self._ended = about.get("object") == "rollouts.end"
            yield from _checked_groups(self._body, groups)

    def check_end(self) -> None:
        if not self._ended:
            raise ConnectionFailed("the stream of groups ended before its last frame")


def _check_status(response: httpx.Response) -> None:
    """Raise ApiError for an error answer, whose body has been read."""
    if response.status_code < 400:
        return
    error: Any = response.text
    with contextlib.suppress(ValueError):
        error = json.loads(response.text)
    if isinstance(error, dict):
        error = error.get("error", error)
    if not isinstance(error, dict):
        error = {"message": str(error)}
    said = error.get("message") or error.get("detail") or response.text
    message = str(said or response.reason_phrase)
    if response.status_code == 404 and response.url.path.endswith(ROLLOUTS):
        message = f"{message}; only ead servers have {ROLLOUTS}; SGLang's router passes none on"
    unavailable = response.status_code >= 500 or response.status_code == 429
    kind = ServerUnavailable if unavailable else RequestRefused
    raise kind(
        response.status_code,
        message[:2000],
        param=error.get("param"),
        kind=error.get("type"),
    )


def _transport_error(error: httpx.HTTPError) -> EadError:
    if isinstance(error, httpx.TimeoutException):
        return TimedOut(f"{type(error).__name__}: {error}")
    return ConnectionFailed(f"{type(error).__name__}: {error}")


def _parse(kind: type[AnswerT], text: str) -> AnswerT:
    try:
        return kind.model_validate(json.loads(text))
    except (ValidationError, ValueError, AttributeError, TypeError) as error:
        raise MalformedAnswer(f"not a {kind.__name__.lower()}: {error}") from error


def _checked_answer(body: Json, response: httpx.Response) -> Answer:
    """The answer, which must show that the schedule was honoured where one was asked for."""
    answer = _parse(Answer, response.text)
    for choice in answer.choices:
        _check_marker(
            body,
            choice.rollout is not None and choice.rollout.annealing is not None,
            choice.rollout is not None,
        )
    return answer


def _check_marker(body: Json, annealed: bool, recorded: bool) -> None:
    asked = {**body, **(body.get("chat_template_kwargs") or {})}
    if asked.get("annealing") is not None and not annealed:
        raise ScheduleIgnored("asked for annealing, and the answer does not say it was applied")
    if asked.get("rollout") not in (None, False) and not recorded:
        raise ScheduleIgnored("asked for a rollout, and the answer carries none")


class _StreamCheck:
    """Reads server-sent events into chunks, and checks the marker at the end of each choice."""

    def __init__(self, body: Json, clock: _Clock) -> None:
        self._body = body
        self._clock = clock
        self._annealed: set[int] = set()
        self._recorded: set[int] = set()
        self._ended = False

    def check_end(self) -> None:
        if not self._ended:
            raise ConnectionFailed("the stream ended before its last event")

    def chunk(self, line: str) -> Chunk | None:
        self._clock.left()
        self._ended = self._ended or line == "data: [DONE]"
        if not line.startswith("data: ") or self._ended:
            return None
        data = line[len("data: ") :]
        if data.startswith('{"error"'):
            error = json.loads(data)["error"]
            raise ServerUnavailable(500, str(error.get("message")), kind=error.get("type"))
        chunk = _parse(Chunk, data)
        for choice in chunk.choices:
            if choice.rollout is not None:
                self._recorded.add(choice.index)
                if choice.rollout.annealing is not None:
                    self._annealed.add(choice.index)
            if choice.finish_reason is not None:
                _check_marker(
                    self._body, choice.index in self._annealed, choice.index in self._recorded
                )
        return chunk


class Client(_Calls):
    """Synchronous client. Use as a context manager, or call `close`.

    base_url: of one server, or of several, of which each call goes to the one with the fewest in
    progress, see `_servers`. timeout: seconds without a byte, or httpx.Timeout. deadline: seconds
    for a call with its retries and its whole answer, looked at between its pieces. retries: further
    tries, with growing pauses, of what is safe to send again: reads, and calls that the server
    never began. model: as served. admin_api_key: for calls that change the server, see `request`.
    compress: rollouts come compressed, a quarter smaller: for slow networks, on others it takes
    longer than it saves.
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
        annealing: Annealing = None,
        rollout: bool | Mapping[str, bool] = False,
        **fields: Any,
    ) -> Answer:
        """One chat request; `fields` are OpenAI's (n, max_tokens, stop, ...).

        Raises ScheduleIgnored when the answer does not show the schedule, RequestRefused for a
        bad field, and the other errors of `ead_client`.
        """
        body = self._chat_body(messages, annealing, rollout, fields)
        return _checked_answer(body, self.request("POST", CHAT, body))

    def complete(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        annealing: Annealing = None,
        rollout: bool | Mapping[str, bool] = False,
        **fields: Any,
    ) -> Answer:
        """Continue one or several prompts, each a text or token ids; n of each, in order."""
        body = self._completion_body(annealing, rollout, {"prompt": prompt, **fields})
        return _checked_answer(body, self.request("POST", COMPLETIONS, body))

    def stream_chat(
        self,
        messages: Messages,
        *,
        annealing: Annealing = None,
        rollout: bool | Mapping[str, bool] = False,
        **fields: Any,
    ) -> Iterator[Chunk]:
        """The answer piece by piece; leaving the iteration ends the generation."""
        body = self._chat_body(messages, annealing, rollout, fields)
        clock = self._clock()
        check = _StreamCheck(body, clock)
        with self.stream(CHAT, {**body, "stream": True}, clock=clock) as response:
            for line in response.iter_lines():
                chunk = check.chunk(line)
                if chunk is not None:
                    yield chunk
        check.check_end()

    def rollouts(
        self,
        prompts: Prompts,
        *,
        n: int = 1,
        annealing: Annealing = None,
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
        repeatable = idempotency_key is not None
        response = self.request("POST", ROLLOUTS, body, repeatable=repeatable, headers=headers)
        return _whole_rollouts(body, response.content)

    def stream_rollouts(
        self,
        prompts: Prompts,
        *,
        n: int = 1,
        annealing: Annealing = None,
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
        stream = _GroupStream(body, clock)
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
        clock: _Clock | None = None,
    ) -> Iterator[httpx.Response]:
        """POST to any route, for an answer that is read as it arrives; its status is checked, and
        what breaks it later raises EadError too. admin: see `request`."""
        headers = self._headers(headers, admin=admin)
        try:
            with self._http.stream(
                "POST", path, json=body, headers=headers, timeout=(clock or self._clock()).timeout()
            ) as response:
                if response.status_code >= 400:
                    response.read()
                _check_status(response)
                yield response
        except httpx.HTTPError as error:
            raise _transport_error(error) from error

    def request(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        content: Iterable[bytes] | None = None,
        repeatable: bool | None = None,
        admin: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Any route of the server. Raises EadError; see `retries`.

        body: JSON. content: in its place, bytes that are sent as they come, and once only.
        repeatable: whether doing it twice is harmless (default: for GET). admin: send the admin
        key, if there is one: for weights, schedule, step, pauses and aborts.
        """
        headers = self._headers(headers, admin=admin)
        repeatable = method == "GET" if repeatable is None else repeatable
        clock = self._clock()
        attempt = 0
        while True:
            try:
                try:
                    response = self._http.request(
                        method,
                        path,
                        json=body,
                        content=content,
                        headers=headers,
                        timeout=clock.timeout(),
                    )
                except httpx.HTTPError as error:
                    raise _transport_error(error) from error
                _check_status(response)
                return response
            except EadError as error:
                if content is not None or not self._may_retry(
                    error, attempt, repeatable=repeatable
                ):
                    raise
            attempt += 1
            time.sleep(self._wait_before(attempt, clock))

    def model_info(self) -> Json:
        """SGLang's /model_info: the model's path and the weight version now served."""
        info: Json = self.request("GET", "/model_info").json()
        return info

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
        annealing: Annealing = None,
        rollout: bool | Mapping[str, bool] = False,
        **fields: Any,
    ) -> Answer:
        """See Client.chat."""
        body = self._chat_body(messages, annealing, rollout, fields)
        return _checked_answer(body, await self.request("POST", CHAT, body))

    async def complete(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        annealing: Annealing = None,
        rollout: bool | Mapping[str, bool] = False,
        **fields: Any,
    ) -> Answer:
        """See Client.complete."""
        body = self._completion_body(annealing, rollout, {"prompt": prompt, **fields})
        return _checked_answer(body, await self.request("POST", COMPLETIONS, body))

    async def stream_chat(
        self,
        messages: Messages,
        *,
        annealing: Annealing = None,
        rollout: bool | Mapping[str, bool] = False,
        **fields: Any,
    ) -> AsyncIterator[Chunk]:
        """See Client.stream_chat."""
        body = self._chat_body(messages, annealing, rollout, fields)
        clock = self._clock()
        check = _StreamCheck(body, clock)
        async with self.stream(CHAT, {**body, "stream": True}, clock=clock) as response:
            async for line in response.aiter_lines():
                chunk = check.chunk(line)
                if chunk is not None:
                    yield chunk
        check.check_end()

    async def rollouts(
        self,
        prompts: Prompts,
        *,
        n: int = 1,
        annealing: Annealing = None,
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
        repeatable = idempotency_key is not None
        response = await self.request(
            "POST", ROLLOUTS, body, repeatable=repeatable, headers=headers
        )
        return _whole_rollouts(body, response.content)

    async def stream_rollouts(
        self,
        prompts: Prompts,
        *,
        n: int = 1,
        annealing: Annealing = None,
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
        stream = _GroupStream(body, clock)
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
        clock: _Clock | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """See Client.stream."""
        headers = self._headers(headers, admin=admin)
        try:
            async with self._http.stream(
                "POST", path, json=body, headers=headers, timeout=(clock or self._clock()).timeout()
            ) as response:
                if response.status_code >= 400:
                    await response.aread()
                _check_status(response)
                yield response
        except httpx.HTTPError as error:
            raise _transport_error(error) from error

    async def request(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        content: AsyncIterable[bytes] | None = None,
        repeatable: bool | None = None,
        admin: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """See Client.request."""
        headers = self._headers(headers, admin=admin)
        repeatable = method == "GET" if repeatable is None else repeatable
        clock = self._clock()
        attempt = 0
        while True:
            try:
                try:
                    response = await self._http.request(
                        method,
                        path,
                        json=body,
                        content=content,
                        headers=headers,
                        timeout=clock.timeout(),
                    )
                except httpx.HTTPError as error:
                    raise _transport_error(error) from error
                _check_status(response)
                return response
            except EadError as error:
                if content is not None or not self._may_retry(
                    error, attempt, repeatable=repeatable
                ):
                    raise
            attempt += 1
            await asyncio.sleep(self._wait_before(attempt, clock))

    async def model_info(self) -> Json:
        """See Client.model_info."""
        info: Json = (await self.request("GET", "/model_info")).json()
        return info

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
