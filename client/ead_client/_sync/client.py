# Generated from _async/client.py by `python scripts/unasync.py`: edit that file instead.
"""The client: its calls, and how they are sent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import httpx

from ead_client._base_client import (
    CHAT,
    COMPLETIONS,
    DEFAULT_TIMEOUT,
    JSON_HEADERS,
    Annealing,
    BaseClient,
    Messages,
    Prompt,
    Prompts,
    is_repeatable,
)
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
from ead_client._clock import Attempt, Clock
from ead_client._json import to_json
from ead_client._rollouts import FRAMES, WHOLE, Group, Rollouts
from ead_client._sync.transport import BalancedTransport
from ead_client._types import NOT_GIVEN, Chunk, Completion, Json, NotGiven
from ead_client.errors import EadError


class Client(BaseClient):
    """Synchronous client. Use as a context manager (`with`), or call `close`.

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

    def _clock(self) -> Clock:
        """Of a call that begins now."""
        return Clock(self._timeout, self._deadline)

    def chat(
        self,
        messages: Messages,
        *,
        annealing: Annealing | NotGiven = NOT_GIVEN,
        rollout: bool | Mapping[str, bool] = False,
        **fields: Any,
    ) -> Completion:
        """One chat request; `fields` are OpenAI's (n, max_tokens, stop, ...).

        annealing: the schedule, as an object, or by the name of a preset ("paper") or of a kind
        ("cosine"); None: none, even where the server has a default one; left out: that default, if
        there is one.

        Raises NotSendable for a keyword that is nearly a known one, before anything is sent;
        ScheduleIgnored when the answer does not show the schedule; RequestRefused for a bad field;
        and the other errors of `ead_client`.
        """
        body = self._chat_body(messages, annealing, rollout, fields)
        return checked_answer(body, self.request("POST", CHAT, body))

    def complete(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        annealing: Annealing | NotGiven = NOT_GIVEN,
        rollout: bool | Mapping[str, bool] = False,
        **fields: Any,
    ) -> Completion:
        """Continue one or several prompts, each a text or token ids; n of each, in order."""
        body = self._completion_body(annealing, rollout, {"prompt": prompt, **fields})
        return checked_answer(body, self.request("POST", COMPLETIONS, body))

    def stream_chat(
        self,
        messages: Messages,
        *,
        annealing: Annealing | NotGiven = NOT_GIVEN,
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
        annealing: Annealing | NotGiven = NOT_GIVEN,
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
        annealing: Annealing | NotGiven = NOT_GIVEN,
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
        headers = {**JSON_HEADERS, **self._headers(headers, admin=admin)}
        content, clock = to_json(body), clock or self._clock()
        repeatable = is_repeatable("POST", headers)

        def attempt() -> httpx.Response:
            return self._send("POST", path, content, headers, clock)

        response = self._with_retries(attempt, clock, repeatable=repeatable, once=False)
        try:
            with clock.reading(response):
                yield response
        except httpx.HTTPError as error:
            ours = transport_error(error)
            raise (clock.expired(after=ours) if clock.is_over else ours) from error
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
            content, headers = to_json(body), {**JSON_HEADERS, **headers}
        once = content is not None and not isinstance(content, bytes)
        repeatable = is_repeatable(method, headers) if repeatable is None else repeatable
        clock = self._clock()

        def attempt() -> httpx.Response:
            response = self._send(method, path, content, headers, clock)
            try:
                with clock.reading(response):
                    response.read()
            except httpx.HTTPError as error:
                raise transport_error(error) from error
            finally:
                response.close()
            return response

        return self._with_retries(attempt, clock, repeatable=repeatable, once=once)

    def _with_retries(
        self, attempt: Attempt, clock: Clock, *, repeatable: bool, once: bool
    ) -> httpx.Response:
        """The answer that `attempt` gives, which is made again where that is safe."""
        tries = 0
        while True:
            try:
                return clock.run(attempt)
            except EadError as error:
                self._check_retry(error, tries, clock, repeatable=repeatable, once=once)
            tries += 1
            clock.sleep(self._wait_before(tries, clock))

    def _send(
        self,
        method: str,
        path: str,
        content: Any,
        headers: Mapping[str, str],
        clock: Clock,
    ) -> httpx.Response:
        """An answer that has begun well, and is to be closed."""
        request = self._http.build_request(
            method,
            path,
            content=content,
            headers=headers,
            timeout=clock.timeout(),
            extensions=clock.extensions,
        )
        try:
            response = self._http.send(request, stream=True)
        except httpx.HTTPError as error:
            raise transport_error(error) from error
        if response.status_code >= 400:
            try:
                with clock.reading(response):
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
        """Close its connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
