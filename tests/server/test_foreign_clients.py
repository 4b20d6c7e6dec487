"""What other people's clients read and write: addresses, keys, streams, numbers, descriptions."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest

from ead_client import Client
from ead_client._address import address_of
from ead_sampler.schedules import AnnealingError, parse_annealing
from ead_server.annealing.recorder import Recorder
from ead_server.calls import Call
from ead_server.edge.guard import Guard
from ead_server.edge.keys import bearer
from ead_server.launch.process import ServerProcess
from ead_server.settings import Settings

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("http://127.0.0.1:30000", "http://127.0.0.1:30000"),
        ("http://127.0.0.1:30000/", "http://127.0.0.1:30000"),
        ("http://127.0.0.1:30000/v1", "http://127.0.0.1:30000"),
        ("http://127.0.0.1:30000/v1/", "http://127.0.0.1:30000"),
        (" http://127.0.0.1:30000\n", "http://127.0.0.1:30000"),
        ("127.0.0.1:30000", "http://127.0.0.1:30000"),
        ("localhost:30000/v1", "http://localhost:30000"),
        ("https://host/ead/v1", "https://host/ead"),
        ("https://host/v1beta", "https://host/v1beta"),
        ("http://[::1]:30000/v1", "http://[::1]:30000"),
    ],
)
def test_an_address_is_taken_as_people_write_it(written: str, meant: str) -> None:
    assert address_of(written) == meant


@pytest.mark.parametrize(
    "written", ["", "http://", "ftp://host", "http://host:x", "http://host:99999", "http://h?x=1"]
)
def test_what_is_no_address_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="base_url: must be"):
        Client(written)


def test_the_address_of_openai_clients_serves_rollouts(server: ServerProcess) -> None:
    with Client(server.url + "/v1") as client:
        (group,) = client.rollouts("hi", max_new_tokens=2).groups  # one prompt, not two letters
        again = client.rollouts([group.prompt_token_ids], max_new_tokens=np.int64(2)).groups
        prefix = {"text": "hi", "prefix_token_ids": group.answers[0].rollout.token_ids}
        longer = client.rollouts([prefix], max_new_tokens=2).groups
    assert list(again[0].prompt_token_ids) == list(group.prompt_token_ids)
    assert len(longer[0].prompt_token_ids) == len(group.prompt_token_ids) + 2


def test_anthropic_s_header_brings_the_key() -> None:
    assert bearer([(b"x-api-key", b"K")]) == "K"
    assert bearer([(b"authorization", b"Bearer A"), (b"x-api-key", b"K")]) == "A"
    assert bearer([(b"authorization", b"Basic A"), (b"x-api-key", b"K")]) == ""


@pytest.mark.parametrize("tokens", [[1, -1, 2], [1, 10**6], [[1], [-1]]])
def test_token_ids_that_are_none_are_a_mistake_of_the_request(
    server: ServerProcess, tokens: Any
) -> None:
    answer = httpx.post(server.url + "/detokenize", json={"model": "m", "tokens": tokens})
    assert answer.status_code == 400, answer.text
    assert "tokens: must be token ids in [0, 1023]" in answer.json()["error"]["message"]


def test_errors_have_openai_s_shape_without_a_schedule_too(server: ServerProcess) -> None:
    for path, body in (
        (CHAT, {"model": "m", "messages": [], "max_tokens": 1}),
        (CHAT, {"model": "m", "messages": [{"role": "user", "content": "x"}], "stop": ""}),
        ("/v1/completions", {"model": "m", "prompt": "x", "max_tokens": 10**6}),
        ("/tokenize", {"model": "m", "prompt": 5}),
    ):
        answer = httpx.post(server.url + path, json=body)
        assert answer.status_code == 400
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, answer.text


@pytest.mark.parametrize("ours", [{"rollout": False}, {"rollout": True}])
def test_metadata_of_annealed_answers_are_strings(
    server: ServerProcess, ours: dict[str, Any]
) -> None:
    """As OpenAI's are, whether arrays are asked for or not; strict clients refuse others."""
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    answer = httpx.post(server.url + CHAT, json={**body, "annealing": {}, **ours}).json()
    assert all(isinstance(value, str) for value in (answer.get("metadata") or {}).values())


def test_columns_wait_for_a_chunk_that_clients_read() -> None:
    """litellm drops chunks without text, and what is in them."""
    recorder, got = Recorder(), []

    def deliver(total: int, content: str, finish: str | None = None) -> None:
        column = [0.5] * total
        meta = {"completion_tokens": total, "temperatures": column, "logprobs": column}
        recorder.observe(
            0, {"meta_info": {**meta, "model_logprobs": column}, "output_ids": [7] * total}
        )
        choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish}
        recorder.enrich_chunk(choice)
        got.append(len(choice["rollout"]["token_ids"]) if "rollout" in choice else None)

    for total, content in ((1, "a"), (2, ""), (3, ""), (4, "b"), (5, "")):
        deliver(total, content)
    deliver(6, "", "stop")
    assert got == [1, None, None, 3, None, 2]


def test_integers_come_back_or_are_refused(server: ServerProcess) -> None:
    """orjson makes floats of those beyond 64 bits."""
    body = b'{"prompts": [{"text": "x", "metadata": %b}], "sampling_params": {"max_new_tokens": 1}}'
    for number in (b"18446744073709551615", b"-9223372036854775808", b'"99999999999999999999"'):
        answer = httpx.post(server.url + "/v1/rollouts", content=body % number, timeout=60)
        assert answer.status_code == 200, answer.text
        assert number in answer.content
    for number in (b"18446744073709551616", b"-9223372036854775809", b"[1%b]" % (b"0" * 300)):
        answer = httpx.post(server.url + "/v1/rollouts", content=body % number, timeout=60)
        assert answer.status_code == 400
        assert "integers must fit 64 bits" in answer.json()["error"]["message"]


# --- the description of the API ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annealing", "right"),
    [
        ({"schedule": "ead", "step": 342.0}, True),
        ({"schedule": "ead", "step": 342.5}, False),
        ({"schedule": "ead", "warmup": 0.0}, True),
        ({"schedule": "piecewise", "knots": [[0, 1.0]]}, True),
        ({"schedule": "piecewise", "knots": [[0]]}, False),
        ({"schedule": "piecewise", "knots": [[0, 1.0, 2.0]]}, False),
        ({"schedule": "piecewise", "knots": [[0, 99.0]]}, False),
        ({"schedule": "piecewise", "knots": [["0", 1.0]]}, False),
        ({"schedule": "segment", "thinking": {"schedule": "ead"}}, True),
        ({"schedule": "segment", "thinking": {"x": 1}}, False),
        ({"schedule": "segment", "thinking": {"schedule": "branch"}}, False),
        ({"schedule": "two_stage", "switch": 5.0}, True),
    ],
    ids=json.dumps,
)
def test_the_description_says_what_the_server_takes(
    server: ServerProcess, annealing: dict[str, Any], right: bool
) -> None:
    described = httpx.get(server.url + "/openapi.json").json()
    schema = {**described, "$ref": "#/components/schemas/Annealing"}
    valid = jsonschema.Draft202012Validator(schema).is_valid(annealing)
    try:
        parse_annealing(annealing)
        taken = True
    except AnnealingError:
        taken = False
    assert (valid, taken) == (right, right)


def test_the_description_knows_the_limit_of_n(server: ServerProcess) -> None:
    schemas = httpx.get(server.url + "/openapi.json").json()["components"]["schemas"]
    assert schemas["RolloutRequest"]["properties"]["n"]["maximum"] == 128
    n = 3.0  # a whole number, as JSON has it
    body = {"prompts": ["x"], "n": n, "sampling_params": {"max_new_tokens": 1}}
    answer = httpx.post(server.url + "/v1/rollouts", json=body, timeout=60).json()
    assert len(answer["groups"][0]["answers"]) == 3


def test_a_client_that_leaves_is_no_bad_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang answers 400 to nobody then."""
    monkeypatch.setenv(
        "EAD_SETTINGS", Settings.model_validate({"log_format": "off"}).model_dump_json()
    )
    told: list[Call] = []
    monkeypatch.setattr("ead_server.edge.guard.record", told.append)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    messages = [
        {"type": "http.request", "body": b"{}", "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    guard = Guard(app)
    guard._admin_paths = frozenset()
    asyncio.run(guard({**scope, "query_string": b""}, receive, send))
    (call,) = told
    assert call.left


@pytest.mark.parametrize("string", ["", "a\0b", "x" * 101])
def test_a_string_that_can_mark_no_token_is_refused(string: str) -> None:
    raw = {"schedule": "segment", "thinking": {}, "restart_strings": ["a", string]}
    with pytest.raises(AnnealingError, match=r"annealing\.restart_strings\[1\]: must have"):
        parse_annealing(raw)
