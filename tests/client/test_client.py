"""The client's promises, on a transport that answers from a script. No server."""

from __future__ import annotations

import asyncio
import json
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

import ead_client
from ead_client import (
    AsyncClient,
    Client,
    ConnectionFailed,
    MalformedAnswer,
    RequestRefused,
    ScheduleIgnored,
    ServerUnavailable,
    TimedOut,
)

ROLLOUT = {
    "token_ids": [5, 6],
    "temperatures": [1.0, 0.5],
    "logprobs": [-1.0, -2.0],
    "model_logprobs": [-1.0, -3.0],
    "prompt_token_ids": [1],
    "annealing": {"schedule": "ead", "step": 0},
    "weight_version": "3",
}
MESSAGES = [{"role": "user", "content": "hi"}]


def answer(**choice: Any) -> dict[str, Any]:
    choices = [{"index": 0, "message": {"content": "ok"}, "finish_reason": "stop", **choice}]
    return {"id": "a", "model": "m", "choices": choices}


class Script:
    """Answers each request with the next of its lines: a response, or an exception to raise."""

    def __init__(self, *lines: Any) -> None:
        self.lines = list(lines)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        line = self.lines.pop(0)
        if isinstance(line, Exception):
            raise line
        return line if isinstance(line, httpx.Response) else httpx.Response(200, json=line)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Client, Script]]:
    """A client whose requests go to a Script, and which does not wait between tries."""
    monkeypatch.setattr(
        ead_client._base_client.BaseClient, "_wait_before", lambda self, attempt, clock: 0.0
    )

    def make(*lines: Any, **options: Any) -> tuple[Client, Script]:
        lines_ = Script(*lines)
        return Client("http://x", transport=httpx.MockTransport(lines_), **options), lines_

    return make


def test_a_rollout_arrives_as_numpy_arrays(script: Any) -> None:
    client, sent = script(answer(rollout=ROLLOUT))
    choice = client.chat(MESSAGES, annealing={"tau_max": 1.2}, n=1).choices[0]
    assert choice.text == "ok"
    rollout = choice.rollout
    assert rollout.token_ids.dtype == np.int64
    for name in ("temperatures", "logprobs", "model_logprobs"):
        assert getattr(rollout, name).dtype == np.float32
    assert rollout.model_logprobs.tolist() == [-1.0, -3.0]
    assert rollout.entropies is None
    assert len(rollout) == 2
    body = json.loads(sent.requests[0].content)
    assert body == {
        "model": "default",
        "messages": MESSAGES,
        "n": 1,
        "chat_template_kwargs": {"annealing": {"tau_max": 1.2}},
    }


def test_our_fields_of_a_chat_go_where_sglangs_router_passes_them_on(script: Any) -> None:
    client, sent = script(*[answer(rollout=ROLLOUT)] * 2, answer())
    client.chat(MESSAGES, annealing={}, rollout={"entropies": True}, chat_template_kwargs={"a": 1})
    client.complete("hi", annealing={}, rollout=True)
    client.chat(MESSAGES, chat_template_kwargs={"annealing": None})  # opts out of a default
    chat, completion, plain = (json.loads(request.content) for request in sent.requests)
    assert chat["chat_template_kwargs"] == {
        "a": 1,
        "annealing": {},
        "rollout": {"entropies": True},
    }
    assert "annealing" not in chat
    assert (completion["annealing"], completion["rollout"]) == ({}, True)
    assert plain["chat_template_kwargs"] == {"annealing": None}


@pytest.mark.parametrize(
    ("asked", "choice"),
    [
        ({"annealing": {}}, {}),
        ({"annealing": {}}, {"rollout": {**ROLLOUT, "annealing": None}}),
        ({"rollout": True}, {}),
        ({"chat_template_kwargs": {"annealing": {}}}, {}),
    ],
)
def test_an_ignored_schedule_is_an_error(
    script: Any, asked: dict[str, Any], choice: dict[str, Any]
) -> None:
    client, _ = script(answer(**choice))
    with pytest.raises(ScheduleIgnored):
        client.chat(MESSAGES, **asked)


def test_a_plain_answer_needs_no_marker(script: Any) -> None:
    client, _ = script(answer())
    assert client.chat(MESSAGES).choices[0].rollout is None


@pytest.mark.parametrize(
    "broken",
    [
        {"choices": 3},
        httpx.Response(200, text="<html>"),
        answer(rollout={**ROLLOUT, "temperatures": [1.0]}),
        answer(rollout={**ROLLOUT, "logprobs": ["x", "y"]}),
    ],
)
def test_a_malformed_answer_is_its_own_error(script: Any, broken: Any) -> None:
    client, _ = script(broken)
    with pytest.raises(MalformedAnswer):
        client.chat(MESSAGES, rollout=True)


def error(status: int, **fields: Any) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": "no", **fields}})


def test_a_refusal_names_the_field_and_is_not_retried(script: Any) -> None:
    client, sent = script(error(400, param="annealing.tau_max", type="invalid_request_error"))
    with pytest.raises(RequestRefused) as caught:
        client.chat(MESSAGES, annealing={"tau_max": 99})
    assert (caught.value.status, caught.value.param) == (400, "annealing.tau_max")
    assert len(sent.requests) == 1
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.status, again.message, again.param) == (400, "no", "annealing.tau_max")


@pytest.mark.parametrize(
    "failure",
    [error(503), error(429), httpx.ConnectError("refused"), httpx.ConnectTimeout("slow")],
)
def test_what_the_server_never_began_is_sent_again(script: Any, failure: Any) -> None:
    client, sent = script(failure, failure, answer())
    assert client.chat(MESSAGES).choices
    assert len(sent.requests) == 3


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (httpx.ReadTimeout("slow"), TimedOut),
        (httpx.RemoteProtocolError("gone"), ConnectionFailed),
        (error(500), ServerUnavailable),
    ],
)
def test_a_call_that_may_have_run_is_not_sent_again(
    script: Any, failure: Any, kind: type[Exception]
) -> None:
    client, sent = script(failure)
    with pytest.raises(kind):
        client.chat(MESSAGES)
    assert len(sent.requests) == 1


def test_reads_are_sent_again_whatever_happened(script: Any) -> None:
    client, sent = script(httpx.ReadTimeout("slow"), {"weight_version": "4"})
    assert client.model_info()["weight_version"] == "4"
    assert len(sent.requests) == 2


def test_tries_end(script: Any) -> None:
    client, sent = script(*[error(503)] * 3, retries=2)
    with pytest.raises(ServerUnavailable):
        client.chat(MESSAGES)
    assert len(sent.requests) == 3


def test_pauses_grow_and_are_bounded() -> None:
    client = Client("http://x")
    for attempt in range(1, 12):
        longest = min(0.25 * 2**attempt, 8.0)
        assert longest / 2 <= client._wait_before(attempt, client._clock()) <= longest


def test_every_transport_error_of_httpx_becomes_ours(script: Any) -> None:
    def leaves(kind: type) -> list[type]:
        below = kind.__subclasses__()
        return [leaf for child in below for leaf in leaves(child)] if below else [kind]

    kinds = leaves(httpx.TransportError)
    assert len(kinds) > 8
    for kind in kinds:
        client, _ = script(kind("x"), retries=0)
        with pytest.raises((ConnectionFailed, TimedOut)):
            client.chat(MESSAGES)


def stream(*chunks: Any, end: str = "data: [DONE]\n\n") -> httpx.Response:
    events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    headers = {"content-type": "text/event-stream"}
    return httpx.Response(200, headers=headers, text="".join([*events, end]))


def piece(text: str, **choice: Any) -> dict[str, Any]:
    return {
        "id": "a",
        "model": "m",
        "choices": [{"index": 0, "delta": {"content": text}, **choice}],
    }


def test_a_stream_gives_text_and_arrays_as_they_come(script: Any) -> None:
    client, _ = script(
        stream(
            piece("a", rollout=ROLLOUT),
            piece("b", finish_reason="stop"),
            {"id": "a", "model": "m", "choices": []},
        )
    )
    chunks = list(client.stream_chat(MESSAGES, annealing={}))
    assert [c.text for chunk in chunks for c in chunk.choices] == ["a", "b"]
    assert chunks[0].choices[0].rollout.temperatures.tolist() == [1.0, 0.5]


def test_a_stream_without_the_marker_is_an_error(script: Any) -> None:
    client, _ = script(stream(piece("a"), piece("b", finish_reason="stop")))
    with pytest.raises(ScheduleIgnored):
        list(client.stream_chat(MESSAGES, annealing={}))


def test_a_stream_that_ends_early_is_an_error(script: Any) -> None:
    """Also where a proxy ends the connection as if all were well."""
    client, _ = script(stream(piece("a"), end=""))
    chunks = client.stream_chat(MESSAGES)
    assert next(chunks).choices[0].text == "a"
    with pytest.raises(ConnectionFailed, match="before its last event"):
        next(chunks)


@pytest.mark.parametrize(
    ("response", "says"),
    [
        (httpx.Response(404), "HTTP 404: Not Found; only ead servers have /v1/rollouts"),
        (httpx.Response(404, json={"detail": "Not Found"}), "HTTP 404: Not Found; only ead"),
        (httpx.Response(401), "HTTP 401: Unauthorized"),
        (httpx.Response(422, text="no such type"), "HTTP 422: no such type"),
    ],
)
def test_errors_in_the_shapes_of_routers_and_plain_servers_are_readable(
    script: Any, response: httpx.Response, says: str
) -> None:
    client, _ = script(response)
    with pytest.raises(RequestRefused) as caught:
        client.rollouts(["x"])
    assert str(caught.value).startswith(says)


def test_errors_before_and_inside_a_stream(script: Any) -> None:
    client, _ = script(error(400), stream({"error": {"message": "late"}}))
    with pytest.raises(RequestRefused):
        list(client.stream_chat(MESSAGES))
    with pytest.raises(ServerUnavailable, match="late"):
        list(client.stream_chat(MESSAGES))


def test_the_async_client_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ead_client._base_client.BaseClient, "_wait_before", lambda self, attempt, clock: 0.0
    )
    lines = Script(
        error(503),
        answer(rollout=ROLLOUT),
        answer(),
        stream(piece("a", rollout=ROLLOUT, finish_reason="stop")),
        {"weight_version": "4"},
    )

    async def calls() -> None:
        async with AsyncClient("http://x", transport=httpx.MockTransport(lines)) as client:
            first = await client.chat(MESSAGES, annealing={})
            assert first.choices[0].rollout is not None
            with pytest.raises(ScheduleIgnored):
                await client.complete("hi", rollout=True)
            chunks = [chunk async for chunk in client.stream_chat(MESSAGES, annealing={})]
            assert chunks[0].choices[0].text == "a"
            assert (await client.model_info())["weight_version"] == "4"

    asyncio.run(calls())
    assert len(lines.requests) == 5


def test_answers_come_compressed_only_if_told() -> None:
    for options, encoding in (({}, "identity"), ({"compress": True}, "gzip")):
        lines = Script(answer())
        Client("http://x", transport=httpx.MockTransport(lines), **options).chat(MESSAGES)
        assert lines.requests[0].headers["accept-encoding"] == encoding


def test_the_key_is_sent_and_never_shown() -> None:
    lines = Script(answer())
    client = Client("http://x", api_key="s3cret", transport=httpx.MockTransport(lines))
    client.chat(MESSAGES)
    assert lines.requests[0].headers["authorization"] == "Bearer s3cret"
    assert "s3cret" not in repr(client)


def test_public_names_are_complete_and_sorted() -> None:
    assert ead_client.__all__ == sorted(ead_client.__all__)
    assert all(hasattr(ead_client, name) for name in ead_client.__all__)


def test_importing_the_client_loads_nothing_heavy() -> None:
    code = "import sys, ead_client; print(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in output.stdout.split()}
    assert not loaded & {"torch", "sglang", "transformers", "fastapi", "ead_sampler"}


# --- several servers ---------------------------------------------------------------------------


class Fleet:
    """Servers a, b and c, each of which answers, refuses the connection, or says 503."""

    def __init__(self) -> None:
        self.state = dict.fromkeys("abc", "well")
        self.asked: list[str] = []  # server and path of each request that arrived

    def __call__(self, request: httpx.Request) -> httpx.Response:
        name = request.url.host
        assert request.headers["host"] == name
        if self.state[name] == "gone":
            raise httpx.ConnectError("refused", request=request)
        self.asked.append(name + request.url.path)
        if self.state[name] == "lost":
            raise httpx.ReadError("lost", request=request)
        if self.state[name] == "busy":
            return httpx.Response(503, json={"error": {"message": "not ready"}})
        return httpx.Response(200, json=answer(), request=request)

    def servers(self) -> Counter[str]:
        """How many calls each got, and forget them. Probes do not count."""
        counts = Counter(name[0] for name in self.asked if not name.endswith("/health/ready"))
        self.asked.clear()
        return counts


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, fleet: Fleet) -> Iterator[Callable[..., Any]]:
    """request("POST", path, body, ...) of a client of all three, of either kind."""
    urls = ["http://a", "http://b/", "http://c/below"]
    transport = httpx.MockTransport(fleet)
    if request.param == "sync":
        with Client(urls, transport=transport, retries=0) as client:
            yield client.request
        return
    with asyncio.Runner() as runner:
        other = AsyncClient(urls, transport=transport, retries=0)
        yield lambda *args, **fields: runner.run(other.request(*args, **fields))
        runner.run(other.aclose())


def test_calls_are_shared_evenly_and_paths_kept(ask: Any, fleet: Fleet) -> None:
    for _ in range(9):
        ask("POST", "/v1/completions", {})
    assert {name.partition("/")[2] for name in fleet.asked} == {
        "v1/completions",
        "below/v1/completions",
    }
    assert fleet.servers() == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize("trouble", ["gone", "busy"])
def test_a_call_that_was_not_begun_goes_to_another_at_once(
    trouble: str, ask: Any, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(ead_client._servers.time, "monotonic", lambda: now)
    fleet.state["a"] = trouble
    for _ in range(6):
        assert ask("POST", "/v1/completions", {}).status_code == 200
    counts = fleet.servers()
    assert counts["b"] == counts["c"] == 3
    assert counts["a"] <= 1  # and then no more
    now += 1.5  # time to look, and to find it so still
    for _ in range(3):
        ask("POST", "/v1/completions", {})
    assert fleet.servers()["a"] == 0
    fleet.state["a"] = "well"
    ask("POST", "/v1/completions", {})
    assert fleet.servers()["a"] == 0  # the next look is two seconds after the last
    now += 2.5
    for _ in range(6):
        ask("POST", "/v1/completions", {})
    assert fleet.servers()["a"] >= 2


def test_a_call_that_was_lost_is_not_made_again(ask: Any, fleet: Fleet) -> None:
    fleet.state = dict.fromkeys("abc", "lost")
    with pytest.raises(ConnectionFailed):
        ask("POST", "/v1/completions", {})
    assert fleet.servers().total() == 1


def test_when_all_are_gone_the_error_says_so(ask: Any, fleet: Fleet) -> None:
    fleet.state = dict.fromkeys("abc", "gone")
    for _ in range(2):
        with pytest.raises(ConnectionFailed, match="refused"):
            ask("POST", "/v1/completions", {})


def test_a_key_stays_with_its_server(ask: Any, fleet: Fleet) -> None:
    for key in ("one", "two", "three", "four", "five"):
        headers = {"idempotency-key": key}
        for _ in range(4):
            ask("POST", "/v1/rollouts", {}, headers=headers)
        assert len(fleet.servers()) == 1
    ask("POST", "/v1/rollouts", {}, headers={"idempotency-key": "one"})
    ((name, _),) = fleet.servers().items()
    fleet.state[name] = "gone"
    ask("POST", "/v1/rollouts", {}, headers={"idempotency-key": "one"})
    assert fleet.servers().total() == 1


def test_what_is_in_progress_counts(fleet: Fleet) -> None:
    """A stream that is still read keeps its server out of turn."""
    body = b"data: " + json.dumps(answer()).encode() + b"\n\ndata: [DONE]\n\n"

    def streamed(request: httpx.Request) -> httpx.Response:
        fleet(request)
        return httpx.Response(200, content=iter([body]))  # as from a connection

    with Client(["http://a", "http://b"], transport=httpx.MockTransport(streamed)) as client:
        reading = client.stream_chat(MESSAGES)
        next(reading)
        ((busy, _),) = fleet.servers().items()
        for _ in range(4):
            assert [chunk.choices[0].text for chunk in client.stream_chat(MESSAGES)] == ["ok"]
        assert fleet.servers()[busy] == 0
        reading.close()
        for _ in range(4):
            list(client.stream_chat(MESSAGES))
        assert fleet.servers()[busy] == 2


def test_what_changes_a_server_goes_to_one_alone(ask: Any, fleet: Fleet) -> None:
    with pytest.raises(ValueError, match="a Client of that server alone"):
        ask("PUT", "/v1/annealing/step", {"step": 1}, admin=True)
    assert not fleet.asked
    with pytest.raises(ValueError, match="one server at least"):
        Client([])


# --- deadlines ---------------------------------------------------------------------------------


def test_a_deadline_holds_for_all_tries_together(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    waits: list[float] = []

    def pause(seconds: float) -> None:
        nonlocal now
        now += seconds

    def busy(request: httpx.Request) -> httpx.Response:
        nonlocal now
        now += 1.0
        waits.append(request.extensions["timeout"]["read"])
        return httpx.Response(503, json={"error": {"message": "busy"}})

    monkeypatch.setattr(ead_client._clock.time, "monotonic", lambda: now)
    monkeypatch.setattr(ead_client._clock.time, "sleep", pause)
    with (
        Client(
            "http://x", transport=httpx.MockTransport(busy), deadline=10.0, retries=99
        ) as client,
        pytest.raises(TimedOut, match="deadline of 10 s"),
    ):
        client.chat(MESSAGES)
    assert now <= 11
    assert waits[0] == 10.0
    assert waits == sorted(waits, reverse=True)


def test_a_deadline_ends_a_stream_between_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(ead_client._clock.time, "monotonic", lambda: now)
    event = b"data: " + json.dumps(answer()).encode() + b"\n\n"
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=event * 50))
    with Client("http://x", transport=transport, deadline=10.0) as client:
        chunks = client.stream_chat(MESSAGES)
        for _ in range(3):
            next(chunks)
        now = 11.0
        with pytest.raises(TimedOut):
            next(chunks)


# --- in notebooks, on terminals, in torch --------------------------------------------------------


def with_tokens() -> ead_client.Completion:
    content = [{"token": text, "logprob": -1.0} for text in ("<b>", "\n")]
    rollout = {**ROLLOUT, "entropies": [0.5, 2.0], "finish_reason": "stop"}
    return ead_client.Completion.model_validate(
        answer(logprobs={"content": content}, rollout=rollout)
    )


def test_a_notebook_shows_tokens_in_colours_and_numbers_on_hover() -> None:
    html = with_tokens()._repr_html_()
    spans = re.findall(r'<span title="([^"]*)" style="background:([^"]*)">([^<]*)</span>', html)
    assert [text for _, _, text in spans] == ["&lt;b&gt;", "\n"]  # nothing of it is markup
    assert spans[0][0].splitlines() == [
        "t = 0, token 5",
        "temperature 1",
        "log mu -1",
        "log pi -1",
        "entropy 0.5",
    ]
    assert spans[0][1] != spans[1][1]
    # without the tokens' texts: the text, and the ids
    plain = ead_client.Completion.model_validate(answer(rollout=ROLLOUT))._repr_html_()
    assert "ok<br>" in plain
    assert ">5 </span>" in plain
    failed = ead_client.Choice(index=0, text="", error={"message": "<too long>"})
    assert "&lt;too long&gt;" in failed._repr_html_()


def test_a_long_answer_does_not_fill_the_notebook() -> None:
    many = 5000
    columns = {name: [0.5] * many for name in ("temperatures", "logprobs", "model_logprobs")}
    rollout = ead_client.Rollout.model_validate({"token_ids": [1] * many, **columns})
    html = rollout._repr_html_()
    assert html.count("<span") == 4096
    assert html.endswith("and 904 more")


def test_a_rollout_is_told_in_a_line() -> None:
    rollout = with_tokens().choices[0].rollout
    assert repr(rollout) == (
        "Rollout(tokens=2, temperatures=1 to 0.5, logprob=-1.5, model_logprob=-2, "
        "finish_reason=stop)"
    )
    assert dict(rollout.__rich_repr__())["tokens"] == 2  # type: ignore[union-attr]


def test_columns_become_tensors() -> None:
    torch = pytest.importorskip("torch")
    rollout = with_tokens().choices[0].rollout
    assert rollout is not None
    tensors = rollout.to_torch()
    assert set(tensors) == {
        *("token_ids", "temperatures", "logprobs", "model_logprobs", "entropies"),
        "prompt_token_ids",
    }
    assert tensors["token_ids"].dtype == torch.int64
    assert tensors["temperatures"].dtype == torch.float32
    assert tensors["entropies"].tolist() == [0.5, 2.0]
    rollout.temperatures.flags.writeable = False  # as a view of bytes
    rollout.to_torch()["temperatures"][0] = 9
    assert rollout.temperatures[0] == 1
