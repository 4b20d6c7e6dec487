"""The client on a bad line: odd answers, slow and broken servers, proxies. No server of ours."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

import ead_client
from ead_client import (
    ApiError,
    AsyncClient,
    Client,
    ConnectionFailed,
    EadError,
    MalformedAnswer,
    NotSendable,
    RequestRefused,
    ServerUnavailable,
    TimedOut,
)
from ead_client._json import lines_of

MESSAGES = [{"role": "user", "content": "hi"}]
ANSWER = {
    "id": "a",
    "model": "m",
    "choices": [{"index": 0, "message": {"content": "ok"}, "finish_reason": "stop"}],
}


def chunk(text: str) -> dict[str, Any]:
    choices = [{"index": 0, "delta": {"content": text}, "finish_reason": None}]
    return {"id": "a", "model": "m", "choices": choices}


def events(*bodies: Any) -> bytes:
    said = [json.dumps(body, ensure_ascii=False) for body in bodies]
    return (
        "".join(f"data: {line}\n\n" for line in [*said, "[DONE]"])
        .replace('"[DONE]"', "[DONE]")
        .encode()
    )


def client_of(answer: Callable[[httpx.Request], httpx.Response], **options: Any) -> Client:
    return Client("http://x", transport=httpx.MockTransport(answer), **options)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ead_client._base_client.BaseClient, "_wait_before", lambda self, attempt, clock: 0.0
    )


# --- every character and every number -------------------------------------------------------------

ODD = "ab\u2028c\u2029d\u0085e\x0bf\x0cg\x1ch\x1ei\x00j\ufeffk\rl\\nm\U0001f600"


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_stream_gives_every_character(kind: str, size: int) -> None:
    data = events(chunk(ODD), chunk("end"))
    parts = [data[i : i + size] for i in range(0, len(data), size)]

    async def arriving() -> Any:
        for part in parts:
            yield part

    async def asked() -> list[str]:
        transport = httpx.MockTransport(lambda _: httpx.Response(200, content=arriving()))
        async with AsyncClient("http://x", transport=transport) as client:
            chunks = [one async for one in client.stream_chat(MESSAGES)]
        return [one.choices[0].text for one in chunks]

    if kind == "async":
        assert asyncio.run(asked()) == [ODD, "end"]
        return
    client = client_of(lambda _: httpx.Response(200, content=iter(parts)))
    assert [one.choices[0].text for one in client.stream_chat(MESSAGES)] == [ODD, "end"]


def test_lines_end_at_newlines_alone() -> None:
    assert [*lines_of([b"a\xe2\x80", b"\xa8b\r\nc", b"\x85"[:0], b"\n\nlast"])] == [
        "a\u2028b",
        "c",
        "",
    ]


def test_events_may_come_without_a_space_and_with_carriage_returns() -> None:
    data = events(chunk("a")).replace(b"data: ", b"data:").replace(b"\n", b"\r\n")
    client = client_of(lambda _: httpx.Response(200, content=b": ping\r\n\r\n" + data))
    assert [one.choices[0].text for one in client.stream_chat(MESSAGES)] == ["a"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (float("nan"), "prompts[0].metadata.odd: must be a finite number, got nan"),
        (float("-inf"), "prompts[0].metadata.odd: must be a finite number, got -inf"),
        (np.float32("inf"), "prompts[0].metadata.odd: must be a finite number, got inf"),
        (2**64, "prompts[0].metadata.odd: must be an integer of 64 bits, got one of 65"),
        (-(2**63) - 1, "prompts[0].metadata.odd: must be an integer of 64 bits"),
        pytest.param(10**4000, "must be an integer of 64 bits, got one of 13288", id="huge"),
        (["ok", "a\udc80b"], "prompts[0].metadata.odd[1]: has '\\udc80' at 1, half of a character"),
        ({"\ud800": 1}, "prompts[0].metadata.odd: a key has '\\ud800'"),
        ({1, 2}, "prompts[0].metadata.odd: must be a value of JSON, got set"),
        (b"x", "prompts[0].metadata.odd: must be a value of JSON, got bytes"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_name_and_not_sent(value: Any, says: str) -> None:
    client = client_of(lambda _: pytest.fail("it was sent"))
    with pytest.raises(NotSendable) as caught:
        client.rollouts([{"text": "x", "metadata": {"odd": value}}])
    assert says in str(caught.value)


def test_what_json_can_hold_is_sent_as_it_is() -> None:
    sent: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["content-type"] == "application/json"
        sent.append(json.loads(request.content))
        return httpx.Response(200, json=ANSWER)

    values = [ODD, 2**64 - 1, -(2**63), 0.1, -0.0, "1" * 40, None, True]
    arrays = [np.arange(3), np.float32(0.5), np.int64(7), (1, 2), range(2)]
    client_of(answer).request("POST", "/x", {"values": values, "arrays": arrays})
    assert sent == [{"values": values, "arrays": [[0, 1, 2], 0.5, 7, [1, 2], [0, 1]]}]


def test_no_schedule_can_be_asked_for_and_is_not_by_default() -> None:
    sent: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return httpx.Response(400, json={})

    client = client_of(answer)
    nones: list[dict[str, Any]] = [{}, {"annealing": None}]
    for more in nones:
        calls: list[Any] = [client.chat, client.complete, client.rollouts]
        for call in calls:
            with pytest.raises(RequestRefused):
                call(MESSAGES if call == client.chat else ["x"], **more)
    for body in sent[:3]:
        assert "annealing" not in {**body, **body.get("chat_template_kwargs", {})}
    assert sent[3]["chat_template_kwargs"] == {"annealing": None}
    assert sent[4]["annealing"] is None
    assert sent[5]["annealing"] is None


# --- errors of all shapes -------------------------------------------------------------------------

BAD = {"message": "too long", "type": "BadRequestError", "param": "max_tokens", "code": 400}
SHAPES = [
    ({"error": BAD}, 400, "too long"),
    ({"error": {**BAD, "code": "400"}}, 400, "too long"),
    ({"error": {"message": "no", "type": "invalid_request_error", "code": None}}, 400, "no"),
    ({"error": {"message": "no", "code": "context_length_exceeded"}}, 500, "no"),
    ({"error": {"message": "slow down", "code": 429}}, 429, "slow down"),
    ({"error": {"message": "gone", "code": 503}}, 503, "gone"),
    ({"error": "text"}, 500, "text"),
    ({"error": "text", "code": 400}, 400, "text"),
    ({"error": ["a", "b"]}, 500, '["a", "b"]'),
    ({"error": {}}, 500, "no message"),
    ({"id": "a", "error": {"message": "late"}}, 500, "late"),
    ({"object": "error", **BAD}, 400, "too long"),
    (BAD, 400, "too long"),
    ({"detail": [{"msg": "bad"}]}, 500, '[{"msg": "bad"}]'),
]


@pytest.mark.parametrize(("event", "status", "says"), SHAPES)
def test_an_error_event_of_a_stream_is_typed(event: Any, status: int, says: str) -> None:
    client = client_of(lambda _: httpx.Response(200, content=events(chunk("a"), event)))
    chunks = client.stream_chat(MESSAGES)
    assert next(chunks).choices[0].text == "a"
    with pytest.raises(ApiError) as caught:
        next(chunks)
    assert (caught.value.status, caught.value.message) == (status, says)
    unavailable = status >= 500 or status == 429
    assert isinstance(caught.value, ServerUnavailable if unavailable else RequestRefused)


@pytest.mark.parametrize(("body", "said"), [(shape, says) for shape, _, says in SHAPES if shape])
def test_an_error_answer_is_typed(body: Any, said: str) -> None:
    with pytest.raises(RequestRefused) as caught:
        client_of(lambda _: httpx.Response(418, json=body)).chat(MESSAGES)
    assert caught.value.status == 418
    assert said in caught.value.message or said == "no message"


@pytest.mark.parametrize("event", ["text", 7, None, [], {"choices": 3}, "{"])
def test_an_event_that_is_nothing_is_malformed(event: Any) -> None:
    data = b"data: {\n\n" if event == "{" else events(event)
    with pytest.raises(MalformedAnswer):
        list(client_of(lambda _: httpx.Response(200, content=data)).stream_chat(MESSAGES))


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"\xff", b"[" * 100_000])
def test_what_is_no_json_object_is_malformed(body: bytes) -> None:
    client = client_of(lambda _: httpx.Response(200, content=body))
    for call in (client.model_info, lambda: client.chat(MESSAGES)):
        with pytest.raises(MalformedAnswer):
            call()


# --- what is sent again ---------------------------------------------------------------------------


def failing(
    failure: Any, times: int
) -> tuple[Callable[[httpx.Request], httpx.Response], list[int]]:
    calls: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        calls.append(1)
        if len(calls) <= times:
            if isinstance(failure, Exception):
                raise failure
            return httpx.Response(failure, json={"error": {"message": "no"}})
        if request.url.path.endswith("completions") and b'"stream"' in request.content:
            return httpx.Response(200, content=events(chunk("ok")))
        return httpx.Response(200, json=ANSWER)

    return answer, calls


@pytest.mark.parametrize("failure", [502, 504])
@pytest.mark.parametrize("admin", [False, True])
def test_a_gateways_error_does_not_repeat_a_call_that_may_have_run(
    failure: int, admin: bool
) -> None:
    answer, calls = failing(failure, 1)
    client = client_of(answer)
    with pytest.raises(ServerUnavailable):
        client.request("POST", "/v1/weights/disk" if admin else "/generate", {}, admin=admin)
    assert len(calls) == 1
    for method, headers in (("GET", {}), ("POST", {"Idempotency-Key": "k"})):
        answer, calls = failing(failure, 1)
        assert client_of(answer).request(method, "/x", headers=headers).status_code == 200
        assert len(calls) == 2


@pytest.mark.parametrize(
    ("failure", "again"),
    [
        (httpx.ConnectError("refused"), True),
        (httpx.ConnectTimeout("slow"), True),
        (httpx.PoolTimeout("full"), True),
        (503, True),
        (429, True),
        (502, False),
        (504, False),
        (500, False),
        (httpx.ReadError("lost"), False),
        (httpx.ReadTimeout("slow"), False),
    ],
)
def test_a_stream_that_was_never_begun_is_asked_for_again(failure: Any, again: bool) -> None:
    answer, calls = failing(failure, 2)
    client = client_of(answer)
    if again:
        assert [one.choices[0].text for one in client.stream_chat(MESSAGES)] == ["ok"]
        assert len(calls) == 3
        return
    with pytest.raises(EadError):
        list(client.stream_chat(MESSAGES))
    assert len(calls) == 1


def test_a_stream_that_broke_off_is_not_asked_for_again() -> None:
    calls = []

    def answer(request: httpx.Request) -> httpx.Response:
        calls.append(1)

        def parts() -> Iterator[bytes]:
            yield events(chunk("a"))[:-20]
            raise httpx.ReadError("lost")

        return httpx.Response(200, content=parts())

    with pytest.raises(ConnectionFailed):
        list(client_of(answer).stream_chat(MESSAGES))
    assert len(calls) == 1


# --- deadlines, on real connections ---------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class SlowServer:
    """Says `said` to each connection, then one of `trickle` again and again, and never ends."""

    def __init__(self, said: bytes, trickle: bytes = b"") -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._said, self._trickle = said, trickle
        self._ended = threading.Event()
        self.left = threading.Event()  # no client is connected
        self.left.set()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        self.left.clear()
        with connection, contextlib.suppress(OSError):
            connection.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                connection.recv(1 << 16)
            connection.sendall(self._said)
            while not self._ended.is_set():
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(1 << 16):
                        break
                connection.sendall(self._trickle)
        self.left.set()

    def close(self) -> None:
        self._ended.set()
        self._listening.close()


PIECE = events(chunk("x")).partition(b"\n\n")[0] + b"\n\n"
SLOW = {
    "no answer": (b"", b""),
    "a head that trickles": (b"HTTP/1.1 200 OK\r\nx: ", b"y"),
    "a body that trickles": (HEAD, b"1\r\n \r\n"),
    "a stream that stalls": (HEAD + b"%x\r\n%b\r\n" % (len(PIECE), PIECE), b""),
    "an endless stream": (HEAD, b"%x\r\n%b\r\n" % (len(PIECE), PIECE)),
}


@pytest.mark.parametrize("call", ["chat", "stream_chat"])
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("slow", SLOW)
def test_a_deadline_bounds_the_whole_call(slow: str, kind: str, call: str) -> None:
    """The wide margin is for busy machines: without a bound these never end."""
    server = SlowServer(*SLOW[slow])
    started = time.monotonic()

    def sync() -> None:
        with Client(server.url, deadline=0.15, timeout=30) as client:
            for _ in getattr(client, call)(MESSAGES):
                pass

    async def awaited() -> None:
        async with AsyncClient(server.url, deadline=0.15, timeout=30) as client:
            if call == "chat":
                await client.chat(MESSAGES)
                return
            async for _ in client.stream_chat(MESSAGES):
                pass

    with pytest.raises(TimedOut, match=r"within the deadline of 0\.15 s"):
        asyncio.run(awaited()) if kind == "async" else sync()
    assert time.monotonic() - started < 5
    assert slow == "a head that trickles" or server.left.wait(30)  # so generation ends there
    server.close()


def test_a_deadline_may_be_never_and_must_be_a_number() -> None:
    for never in (float("inf"), 1e30):
        client = client_of(lambda _: httpx.Response(200, json=ANSWER), deadline=never)
        assert client.chat(MESSAGES).choices[0].text == "ok"
    with pytest.raises(ValueError, match="deadline: must be a number of seconds"):
        Client("http://x", deadline=float("nan"))


def test_a_deadline_names_the_last_error() -> None:
    def busy(request: httpx.Request) -> httpx.Response:
        time.sleep(0.02)
        return httpx.Response(503, json={"error": {"message": "weights are missing"}})

    client = client_of(busy, deadline=0.2, retries=1000)
    for call in (client.chat, lambda m: list(client.stream_chat(m))):
        with pytest.raises(TimedOut, match=r"ServerUnavailable: HTTP 503: weights are missing"):
            call(MESSAGES)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_deadline_holds_for_all_servers_together(kind: str) -> None:
    asked: list[tuple[str, float]] = []
    now = [0.0]

    def dead(request: httpx.Request) -> httpx.Response:
        waits = request.extensions["timeout"]["connect"]
        asked.append((request.url.host, waits))
        now[0] += waits  # as a server that swallows what is sent to it
        raise httpx.ConnectTimeout("slow")

    urls = [f"http://{name}" for name in "abcd"]
    transport = httpx.MockTransport(dead)
    fields: Any = {"transport": transport, "deadline": 7, "timeout": 5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now[0])
        if kind == "sync":
            ask = lambda: Client(urls, **fields).chat(MESSAGES)  # noqa: E731
        else:
            ask = lambda: asyncio.run(AsyncClient(urls, **fields).chat(MESSAGES))  # noqa: E731
        with pytest.raises(TimedOut, match="ConnectTimeout"):
            ask()
    assert [waits for _, waits in asked] == [5, 2]  # and the others are not asked any more


# --- several servers, connections, proxies --------------------------------------------------------


def out_of_files() -> httpx.ConnectError:
    error = httpx.ConnectError("Too many open files")
    error.__cause__ = OSError(24, "Too many open files")
    return error


@pytest.mark.parametrize(
    ("failure", "marked"),
    [
        (httpx.ReadTimeout("slow"), False),
        (httpx.WriteTimeout("slow"), False),
        (httpx.PoolTimeout("full"), False),
        (httpx.LocalProtocolError("bad header"), False),
        (httpx.UnsupportedProtocol("ftp"), False),
        (out_of_files(), False),
        (httpx.ReadError("reset"), True),
        (httpx.RemoteProtocolError("gone"), True),
        (httpx.ConnectError("refused"), True),
        (httpx.ConnectTimeout("slow"), True),
    ],
)
def test_only_a_servers_own_failure_counts_against_it(failure: Exception, marked: bool) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise failure

    client = Client(["http://a"] * 2, transport=httpx.MockTransport(answer), retries=0)
    with pytest.raises(EadError):
        client.chat(MESSAGES)
    servers = client._http._transport._servers._servers  # type: ignore[attr-defined]
    assert any(server.failures for server in servers) == marked


@pytest.mark.parametrize("several", [False, True])
def test_as_many_calls_go_out_at_once_as_are_made(several: bool) -> None:
    """130, where httpx would let 100 and the others wait."""
    count = 130
    server = SlowServer(b"")
    arrived = threading.Semaphore(0)
    answered = threading.Event()

    def answer(connection: socket.socket) -> None:
        with connection:
            connection.recv(1 << 16)
            arrived.release()
            answered.wait(60)
            body = json.dumps(ANSWER).encode()
            head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
            connection.sendall(head + body)

    server._answer = answer  # type: ignore[method-assign]
    urls = [server.url] * 2 if several else server.url

    async def ask() -> int:
        async with AsyncClient(urls, timeout=60) as client:
            calls = [asyncio.create_task(client.chat(MESSAGES)) for _ in range(count)]
            for _ in range(count):
                assert await asyncio.to_thread(arrived.acquire, timeout=60)
            answered.set()
            return len(await asyncio.gather(*calls))

    assert asyncio.run(ask()) == count
    server.close()


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_server_on_this_machine_is_asked_without_a_proxy(
    variable: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    body = json.dumps(ANSWER).encode()
    server = SlowServer(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    url = server.url.replace("127.0.0.1", host)
    with Client(url, timeout=30) as client:
        assert client.chat(MESSAGES).choices[0].text == "ok"

    async def asked() -> None:
        async with AsyncClient(url, timeout=30) as client:
            assert (await client.chat(MESSAGES)).choices[0].text == "ok"

    asyncio.run(asked())
    server.close()


def test_a_proxy_that_fails_is_named_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://user:s3cret@127.0.0.1:9")
    client = Client("http://far.example:30000", retries=0)
    with pytest.raises(ConnectionFailed, match=r"by the proxy that HTTP_PROXY names") as caught:
        client.chat(MESSAGES)
    assert "s3cret" not in str(caught.value)


# --- thinking -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thinking_that_the_server_sets_apart_is_in_the_answer(name: str) -> None:
    message = {"role": "assistant", "content": None, name: "let me see"}
    whole = ead_client.Completion.model_validate(
        {**ANSWER, "choices": [{"index": 0, "message": message, "finish_reason": "length"}]}
    )
    assert (whole.choices[0].text, whole.choices[0].reasoning) == ("", "let me see")
    piece = {"index": 0, "delta": {name: "let"}, "finish_reason": None}
    part = ead_client.Chunk.model_validate({**ANSWER, "choices": [piece]})
    assert (part.choices[0].text, part.choices[0].reasoning) == ("", "let")
    plain = ead_client.Completion.model_validate(ANSWER)
    assert plain.choices[0].reasoning == ""
    assert "let me see" in whole._repr_html_()
