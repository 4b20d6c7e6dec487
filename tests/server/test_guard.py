"""The edge of `ead serve`: keys, limits, what is never loaded, and how it ends and comes back."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from helpers.guarded import ADMIN_ROUTES, KEY, answers_ready, ask, begins, metric
from helpers.reference import TINY_FLAGS
from helpers.serving import FAST
from helpers.waiting import wait_for
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import TCPStore

from ead_client import Client, EadError, ServerUnavailable
from ead_server import settings
from ead_server.calls import current_call
from ead_server.edge.bodies import MAX_NESTING, SGLANGS
from ead_server.edge.body_shape import shape_of
from ead_server.edge.guard import Guard
from ead_server.edge.keys import refused_key, sglang_admin_paths
from ead_server.edge.stop_regex import matches_fast
from ead_server.launch.process import ServerProcess
from ead_server.settings import Settings

LIMITS = ["--max-body-bytes", "20000", "--max-answers", "8", "--max-n", "4"]
HEALTH = ["/health", "/health/live", "/health/ready", "/ready", "/health_generate"]


@pytest.fixture(scope="module")
def guarded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "key").write_text(KEY + "\n")
    arguments = ["--model-path", str(tiny_model), *TINY_FLAGS, *LIMITS, "--log-format", "json"]
    arguments += ["--api-key-file", str(folder / "key"), "--weights-root", str(folder)]
    with ServerProcess(arguments, folder / "server.log") as process:
        process.wait_until_ready()
        yield process


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


# --- keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "wrong", "", KEY + "x"])
def test_without_the_key_only_health_answers(guarded: ServerProcess, key: str | None) -> None:
    for path in HEALTH:
        assert ask(guarded, "GET", path, key).status_code == 200
    for method, path in [
        ("GET", "/v1/models"),
        ("GET", "/server_info"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/v1/annealing"),
        ("POST", "/generate"),
        ("POST", "/v1/rollouts"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/health/../server_info"),
        ("GET", "/no/such/route"),
        *ADMIN_ROUTES,
    ]:
        response = ask(guarded, method, path, key)
        assert error_of(response, 401)["type"] == "authentication_error", path
        assert response.headers["www-authenticate"] == "Bearer"


def test_the_api_key_does_not_change_the_server(guarded: ServerProcess) -> None:
    assert ask(guarded, "GET", "/v1/models").status_code == 200
    for method, path in ADMIN_ROUTES:
        assert "needs the admin key" in error_of(ask(guarded, method, path), 401)["message"], path
    assert ask(guarded, "POST", "/flush_cache", guarded.admin_api_key).status_code == 200
    assert ask(guarded, "GET", "/v1/models", guarded.admin_api_key).status_code == 200


def test_every_route_that_sglang_marks_is_known() -> None:
    """Also those of routers that it includes."""
    from sglang.srt.entrypoints.http_server import app

    marked = {path for _, path in ADMIN_ROUTES if not path.endswith("_session")}
    marked = {path for path in marked if not path.startswith("/v1/")}
    assert {*marked, "/scale_elastic_ep"} <= set(sglang_admin_paths(app.routes))


def test_without_an_admin_key_what_changes_the_server_is_closed() -> None:
    """The decision alone, on SGLang's own routes: no key, whoever asks, opens them."""
    current = Settings.model_validate({})
    for key in (b"", b"Bearer ", b"Bearer None", b"Bearer x"):
        scope = {"headers": [(b"authorization", key)]}
        refusal = refused_key(current, "/flush_cache", scope, is_admin=True)
        assert refusal is not None
        assert refusal.status == 403
        assert "--admin-api-key" in refusal.message
        assert refused_key(current, "/generate", scope, is_admin=False) is None


def test_keys_show_nowhere(guarded: ServerProcess) -> None:
    """And what SGLang shows in place of the admin key opens nothing."""
    info = ask(guarded, "GET", "/server_info")
    assert info.status_code == 200
    environ = psutil.Process(guarded.process.pid).children(recursive=True)[0].environ()
    own = Settings.model_validate_json(environ["EAD_SETTINGS"]).warm_up_key
    assert ask(guarded, "GET", "/v1/models", own).status_code == 200  # the server's own
    secrets = [KEY, guarded.admin_api_key, own]
    log = guarded.log.read_text(errors="replace")
    for text in (info.text, log, ask(guarded, "GET", "/metrics").text):
        for secret in secrets:
            assert secret not in text
    assert "server_args=" in log or "ServerArgs(" in log  # SGLang does print what it was given
    shown = info.json()["admin_api_key"]
    assert shown
    assert ask(guarded, "GET", "/v1/models", shown).status_code == 401
    assert ask(guarded, "POST", "/flush_cache", shown).status_code == 401
    current = Settings.model_validate({"api_key": KEY, "admin_api_key": "adm-secret"})
    assert KEY not in repr(current)
    assert "adm-secret" not in str(current)


def test_nothing_listens_beyond_this_machine(guarded: ServerProcess) -> None:
    """SGLang's processes send each other pickled objects. The one exception is torch's: the store
    in which the ranks of a model meet, which takes bytes and listens everywhere."""
    root = psutil.Process(guarded.process.pid)
    beyond = [
        (process.name(), connection.laddr.port)
        for process in (root, *root.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
        and connection.laddr.ip not in ("127.0.0.1", "::1")
    ]
    ((name, port),) = beyond
    assert name == "sglang::scheduler"
    # it speaks the store's own protocol: who is no store does not count members
    store = TCPStore("127.0.0.1", port, timeout=timedelta(seconds=30), wait_for_workers=False)
    assert store.num_keys() > 0


# --- limits ------------------------------------------------------------------------------------


def test_a_large_body_is_a_413_before_it_is_read(guarded: ServerProcess) -> None:
    body = json.dumps({"text": "x" * 20_000}).encode()
    for content in (body, iter([body[:9000], body[9000:18000], body[18000:]])):  # chunked too
        error = error_of(ask(guarded, "POST", "/generate", content=content), 413)
        assert "at most 20,000 bytes" in error["message"]
    fits = {"text": "x", "sampling_params": {"max_new_tokens": 1}}
    assert ask(guarded, "POST", "/generate", json=fits).status_code == 200


CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
TEXT = {"model": "m", "prompt": "x", "max_tokens": 2}
NATIVE = {"text": "x", "sampling_params": {"max_new_tokens": 2}}


def native(**params: Any) -> dict[str, Any]:
    return {"text": "x", "sampling_params": {"max_new_tokens": 2, **params}}


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/v1/chat/completions", {**CHAT, "n": 5}, "n: must be an integer in [1, 4], got 5"),
        ("/v1/chat/completions", {**CHAT, "n": 5_000_000}, "in [1, 4], got 5000000"),
        ("/v1/completions", {**TEXT, "n": 5, "stream": True}, "in [1, 4], got 5"),
        ("/v1/completions", {**TEXT, "prompt": ["x"] * 3, "n": 3}, "at most 8, got 9"),
        ("/generate", {**NATIVE, "text": ["x"] * 9}, "at most 8, got 9"),
        ("/generate", native(n=10**9), "in [1, 4], got 1000000000"),
        (
            "/generate",
            {**NATIVE, "return_logprob": True, "top_logprobs_num": 10**9},
            "top_logprobs_num: must be an integer in [0, 20], got 1000000000",
        ),
        (
            "/v1/chat/completions",
            {**CHAT, "logprobs": True, "top_logprobs": 21},
            "top_logprobs_num: must be an integer in [0, 20], got 21",
        ),
        ("/generate", native(stop=["s"] * 17), "stop: must have at most 16 entries, got 17"),
        ("/generate", native(stop="s" * 1025), "stop: must have at most 1024 entries"),
        ("/generate", native(stop_token_ids=[1] * 1025), "stop_token_ids: must have at most"),
        ("/v1/chat/completions", {**CHAT, "stop": ["s"] * 500}, "at most 16 entries, got 500"),
        ("/generate", {"input_ids": [1, 10**6]}, "input_ids: must be token ids in [0, 1023]"),
        ("/generate", {"input_ids": [[1], [-1]]}, "input_ids: must be token ids in [0, 1023]"),
        ("/v1/completions", {**TEXT, "prompt": [5, 10**6]}, "must be token ids in [0, 1023]"),
        ("/generate", native(top_k=2**40), "top_k: must fit 32 bits"),
        ("/v1/completions", {**TEXT, "min_tokens": 10**6}, "min_new_tokens must be in [0, "),
        ("/v1/completions", {**TEXT, "max_tokens": 10**9}, "maximum context length"),
        ("/generate", {**NATIVE, "text": ""}, "prompt: must have at least one token"),
        ("/generate", {**NATIVE, "custom_logit_processor": "x"}, "is refused: it is code"),
        ("/v1/completions", {**TEXT, "logprobs": 21}, "in [0, 20], got 21"),
        ("/invocations", {**CHAT, "n": 5}, "in [1, 4], got 5"),
        (
            "/vertex_generate",
            {"instances": [{"text": "x"}], "parameters": {"sampling_params": {"n": 5}}},
            "in [1, 4], got 5",
        ),
        ("/v1/rollouts", {"prompts": ["x"], "n": 5}, "n: must be an integer in [1, 4], got 5"),
        (
            "/v1/score",
            {"query": "a", "items": ["b"] * 9, "label_token_ids": [1], "model": "m"},
            "at most 8, got 9",
        ),
        (
            "/generate",
            {**NATIVE, "return_logprob": True, "logprob_start_len": -7},
            "logprob_start_len: must be an integer in [-1, ",
        ),
        ("/generate", native(stop_regex="(.|.)*x"), "stop_regex: could take too long to match"),
        ("/v1/completions", {**TEXT, "stop_regex": ["(a+)+$"]}, "could take too long to match"),
        ("/v1/chat/completions", {**CHAT, "stop_regex": "a*b*"}, "could take too long to match"),
        ("/generate", native(stop_regex="("), "stop_regex: is no regular expression"),
        (
            "/generate",
            {**NATIVE, "positional_embed_overrides": [1]},
            "positional_embed_overrides: is refused",
        ),
        ("/generate", {**NATIVE, "custom_labels": {"a": "b"}}, "custom_labels.a: unknown label"),
        (
            "/generate",
            {"text": ["a", "b"], "sampling_params": [{"max_new_tokens": 2}]},
            "sampling_params: must have 2 entries, got 1",
        ),
        (
            "/generate",
            {"text": "a", "sampling_params": []},
            "sampling_params: must have no list, for one prompt, got 0",
        ),
        (
            "/generate",
            {
                "text": ["a", "b"],
                "return_logprob": True,
                "token_ids_logprob": [[1]],
                "sampling_params": {"max_new_tokens": 2},
            },
            "token_ids_logprob: must have 2 entries, got 1",
        ),
        ("/generate", {"input_embeds": [[]]}, "input_embeds: must not be empty"),
        (
            "/generate",
            {**NATIVE, "session_params": {"id": "s", "replace": True}},
            "session_params.replace: needs the rid",
        ),
        (
            "/generate",
            {**NATIVE, "session_params": {"id": "s", "offset": "x"}},
            "session_params.offset: must be int",
        ),
        (
            "/v1/rollouts",
            {"prompts": ["x"], "sampling_params": {"is_normalized": True}},
            "sampling_params.is_normalized: unknown field",
        ),
        (
            "/v1/rollouts",
            {"prompts": ["x"], "sampling_params": {"max_new_tokens": 2, "ignore_eos": "x"}},
            "sampling_params.ignore_eos: invalid type",
        ),
        (
            "/vertex_generate",
            {"instances": [{"text": "x"}], "parameters": {"sampling_params": {"top_k": "5"}}},
            "sampling_params.top_k: invalid type",
        ),
        (
            "/api/generate",
            {"model": "m", "prompt": "x", "stream": False, "options": {"num_predict": "x"}},
            "sampling_params.max_new_tokens: invalid type",
        ),
        (
            "/v1/chat/completions",
            {**CHAT, "chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs.tokenize: is no variable of a template",
        ),
        (
            "/v1/chat/completions",
            {**CHAT, "chat_template_kwargs": {"max_length": 10**9}},
            "chat_template_kwargs.max_length: is no variable",
        ),
        (
            "/v1/chat/completions",
            {**CHAT, "chat_template_kwargs": {"chat_template": "{{1}}"}},
            "chat_template is not allowed",
        ),
        (
            "/v1/tokenize",
            {**CHAT, "chat_template_kwargs": {"chat_template": "{{1}}"}},
            "chat_template is not allowed",
        ),
        ("/v1/messages", {**CHAT, "annealing": {}}, "annealing: not on this route"),
        ("/api/chat", {**CHAT, "annealing": {}}, "annealing: not on this route"),
    ],
)
def test_what_would_hurt_the_engine_is_a_400(
    guarded: ServerProcess, path: str, body: dict[str, Any], says: str
) -> None:
    response = ask(guarded, "POST", path, json=body)
    assert says in response.text
    assert response.status_code == 400 or (body.get("stream") and response.status_code == 200)
    assert ask(guarded, "POST", "/generate", json=NATIVE).status_code == 200


# every route that reads JSON and may be called with the API key or the admin key
READING = [
    ("POST", "/generate"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/rollouts"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/score"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/tokenize"),
    ("POST", "/api/generate"),
    ("POST", "/invocations"),
    ("PUT", "/v1/annealing"),
    ("PUT", "/v1/annealing/step"),
    ("POST", "/update_weights_from_disk"),
]


@pytest.mark.parametrize(("method", "path"), READING)
def test_what_is_no_json_or_too_deep_is_a_400_without_a_place_in_the_code(
    guarded: ServerProcess, method: str, path: str
) -> None:
    bodies = [b"", b"null", b"[]", b"{", b'{"a": 1', b'"x"', '{"a": 1}'.encode("utf-16")]
    bodies += [b'{"a": %b}' % number for number in NO_NUMBERS]
    bodies += [b'{"a": ' + b"[" * deep + b"]" * deep + b"}" for deep in (100, 900, 1000, 9000)]
    bodies.append(b'{"a":' * 200 + b"1" + b"}" * 200)
    for body in bodies:
        answer = ask(guarded, method, path, guarded.admin_api_key, content=body, headers=JSON)
        assert answer.status_code == 400, (body[:50], answer.text)
        assert "error" in answer.json()
        for inside in ("Traceback", 'File \\"', "site-packages", ".py"):
            assert inside not in answer.text, body[:50]


# Python's own parser takes the first four; the last is too large for a float
NO_NUMBERS = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"1" + b"0" * 400)
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("number", NO_NUMBERS)
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/v1/annealing", b'{"annealing": {"tau_max": %b}}'),
        ("PUT", "/v1/annealing/step", b'{"step": %b}'),
        ("POST", "/v1/rollouts", b'{"prompts": ["x"], "annealing": {"tau_max": %b}}'),
        ("POST", "/v1/rollouts", b'{"prompts": [{"text": "x", "metadata": %b}]}'),
        ("POST", "/v1/rollouts", b'{"prompts": ["x"], "sampling_params": {"top_p": %b}}'),
        ("POST", "/generate", b'{"text": "x", "sampling_params": {"temperature": %b}}'),
        ("POST", "/v1/completions", b'{"model": "m", "prompt": "x", "annealing": {"decay": %b}}'),
        ("POST", "/v1/completions", b'{"model": "m", "prompt": "x", "temperature": %b}'),
    ],
)
def test_no_number_is_taken_that_is_none(
    guarded: ServerProcess, method: str, path: str, body: bytes, number: bytes
) -> None:
    answer = ask(guarded, method, path, guarded.admin_api_key, content=body % number, headers=JSON)
    assert "not valid JSON" in error_of(answer, 400)["message"]


TEXTS = st.text(st.sampled_from('[]{}\\"a,:é'))
VALUES = st.recursive(
    TEXTS | st.none() | st.integers(),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(TEXTS, inside, max_size=3),
)


@given(value=VALUES, lists=st.integers(0, 110), ascii=st.booleans())
def test_nesting_is_counted_where_it_is(value: Any, lists: int, ascii: bool) -> None:
    def depth(value: Any) -> int:
        if isinstance(value, dict):
            return 1 + max(map(depth, value.values()), default=0)
        return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0

    for _ in range(lists):
        value = [value, "[" * 3]
    text = json.dumps(value, ensure_ascii=ascii).encode()
    assert (shape_of(text, SGLANGS).nesting > MAX_NESTING) == (depth(value) > MAX_NESTING)


def test_brackets_in_texts_are_no_nesting(guarded: ServerProcess) -> None:
    for text in ("[" * 500, '\\"{' * 300, "\\" * 3 + '"' + "[{" * 200):
        body = {"prompts": [{"text": text, "metadata": [text]}]}
        body["sampling_params"] = {"max_new_tokens": 1}
        group = ask(guarded, "POST", "/v1/rollouts", json=body).json()["groups"][0]
        assert (group["error"], group["metadata"]) == (None, [text])


def test_a_key_that_comes_twice_is_read_once(guarded: ServerProcess) -> None:
    """The guard and SGLang must not read different values of the same body."""
    inside = str(guarded.log.parent)
    for first, last in ((inside, "/etc"), ("/etc", inside)):
        body = json.dumps({"model_path": first})[:-1] + ', "model_path": ' + json.dumps(last) + "}"
        answer = ask(
            guarded,
            "POST",
            "/update_weights_from_disk",
            guarded.admin_api_key,
            content=body,
            headers=JSON,
        )
        assert answer.status_code == (403 if last == "/etc" else 400), answer.text
    body = '{"model": "m", "prompt": "x", "annealing": {}, "annealing": {"tau_max": 99}}'
    answer = ask(guarded, "POST", "/v1/completions", content=body, headers=JSON)
    assert error_of(answer, 400)["param"] == "annealing.tau_max"


def test_large_headers_are_refused(guarded: ServerProcess) -> None:
    for size in (66_000, 1_000_000):
        for options in ({"headers": {"x-large": "x" * size}}, {"params": {"x": "y" * 65_530}}):
            try:
                status = ask(guarded, "GET", "/v1/models", **options).status_code
            except httpx.TransportError:  # h11 closes while they are still being sent
                status = 400
            assert status in (400, 431)
    assert ask(guarded, "GET", "/v1/models").status_code == 200


def through_the_guard(
    monkeypatch: pytest.MonkeyPatch, scope: dict[str, Any], **given: Any
) -> tuple[list[dict[str, Any]], list[Any]]:
    """What a guard with these settings answers, and for which call it lets the app work."""
    monkeypatch.setattr(settings, "current", lambda: Settings.model_validate(given))
    sent: list[dict[str, Any]] = []
    calls: list[Any] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def app(*_: Any) -> None:
        calls.append(current_call.get())

    guard = Guard(app)
    guard._admin_paths = frozenset()
    whole = {"type": "http", "method": "GET", "headers": [], "query_string": b"", **scope}
    asyncio.run(guard(whole, receive, send))
    return sent, calls


def test_large_headers_are_refused_whatever_parses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """httptools, which uvicorn takes where it is installed, has no limit of its own."""
    scope: dict[str, Any] = {"path": "/v1/models", "headers": [(b"x-large", b"x" * 70_000)]}
    sent, calls = through_the_guard(monkeypatch, scope)
    assert (sent[0]["status"], calls) == (431, [])
    sent, calls = through_the_guard(monkeypatch, {**scope, "headers": []})
    assert (sent, len(calls)) == ([], 1)


def test_a_websocket_needs_the_key_and_has_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    scope = {"type": "websocket", "path": "/v1/realtime"}
    sent, calls = through_the_guard(monkeypatch, scope, api_key=KEY)
    assert (sent, calls) == ([{"type": "websocket.close", "code": 1008}], [])
    key = [(b"authorization", f"Bearer {KEY}".encode())]
    _, (call,) = through_the_guard(monkeypatch, {**scope, "headers": key}, api_key=KEY, max_n=3)
    assert call.settings.max_n == 3


def test_the_same_request_id_twice_is_two_requests(guarded: ServerProcess) -> None:
    """SGLang keeps one state for both, or refuses; here each gets an id of its own."""
    body = {**NATIVE, "rid": "same", "sampling_params": {"max_new_tokens": 40, "ignore_eos": True}}
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(lambda _: ask(guarded, "POST", "/generate", json=body).json(), range(4))
        )
    assert len({answer["meta_info"]["id"] for answer in answers}) == 4
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [40] * 4
    batch = {**NATIVE, "text": ["x", "y"], "rid": ["same", "same"]}
    assert len(ask(guarded, "POST", "/generate", json=batch).json()) == 2


def test_a_picture_s_address_is_not_fetched(guarded: ServerProcess) -> None:
    """This model reads no pictures; SGLang would fetch whatever address it is given for one."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.5)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/x.png"
        part = {"type": "image_url", "image_url": {"url": url}}
        chat = {**CHAT, "messages": [{"role": "user", "content": [part]}]}
        assert ask(guarded, "POST", "/v1/chat/completions", json=chat).status_code == 400
        for field in ("image_data", "audio_data", "video_data"):
            ask(guarded, "POST", "/generate", json={**NATIVE, field: url})
        with pytest.raises(TimeoutError):
            listening.accept()


@pytest.mark.parametrize(
    ("pattern", "fast"),
    [
        ("\\n\\n", True),
        ("</answer>|\\\\boxed\\{[^}]*\\}", True),
        ("\\n{1,5}Question:\\s{1,5}\\d{1,4}", True),
        ("(?:ab){3}c+(?=d)", True),
        ("(?P<x>a)(?(x)b|c)\\1", True),
        ("(a|b){8}", True),
        ("(a|b)*c", True),  # one set of letters
        ("(ab|a|b)*c", False),
        ("(a+)+$", False),
        ("(a{1,500}){1,500}", False),
        ("a*b*c", False),
        ("(?=(a|a)*b)c", False),
        ("(.|.){60}x", False),
        ("(?>(a*)*)b", False),
    ],
)
def test_patterns_are_told_apart_by_how_they_are_matched(pattern: str, fast: bool) -> None:
    assert matches_fast(pattern) is fast


def test_request_ids_are_the_server_s(guarded: ServerProcess) -> None:
    """A client that names its requests "a" and leaves would end those of all that begin with a."""
    answer = ask(guarded, "POST", "/generate", json={**NATIVE, "rid": "a"}).json()
    assert len(answer["meta_info"]["id"]) == 32
    chat = ask(guarded, "POST", "/v1/chat/completions", json={**CHAT, "rid": "a"}).json()
    assert len(chat["id"]) == 32


# --- weights -----------------------------------------------------------------------------------


def test_weights_come_from_one_folder_and_are_never_pickled(
    guarded: ServerProcess, tiny_model: Path
) -> None:
    root = guarded.log.parent

    def load(**body: Any) -> httpx.Response:
        return ask(guarded, "POST", "/update_weights_from_disk", guarded.admin_api_key, json=body)

    inside = root / "weights"
    inside.mkdir()
    for file in tiny_model.iterdir():
        (inside / file.name).write_bytes(file.read_bytes())
    assert load(model_path=str(inside)).json()["success"]

    link = root / "link"
    link.symlink_to(tiny_model)
    for path in (str(tiny_model), str(link), f"{inside}/../../", "/etc", "user/name-on-a-hub"):
        error = error_of(load(model_path=path), 403)
        assert "must be in the folder given as --weights-root" in error["message"]
    (root / "pickled").mkdir()
    (root / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "safetensors" in error_of(load(model_path=str(root / "pickled")), 400)["message"]
    error = error_of(load(model_path=str(inside), load_format="pt"), 403)
    assert error["param"] == "load_format"
    for path in ("/update_weights_from_tensor", "/load_lora_adapter_from_tensors"):
        response = ask(guarded, "POST", path, guarded.admin_api_key, json={})
        assert "pickled data" in error_of(response, 403)["message"]


# --- the log and the metrics ---------------------------------------------------------------------


def test_each_request_is_one_line_and_counted(guarded: ServerProcess) -> None:
    before = {
        name: metric(guarded, name)
        for name in (
            'ead_requests_total{schedule="ead"}',
            'ead_tokens_total{schedule="ead"}',
            'ead_temperature_count{position="0+"}',
            'ead_entropy_nats_count{position="10+"}',
            'ead_refused_total{reason="schedule"}',
            'ead_refused_total{reason="limit"}',
            'ead_rollout_bytes_total{format="json"}',
        )
    }
    size = guarded.log.stat().st_size
    body = {"prompts": ["x"], "n": 3, "annealing": {**FAST, "step": 5}, "entropies": True}
    body["sampling_params"] = {"max_new_tokens": 15, "ignore_eos": True}
    answer = ask(guarded, "POST", "/v1/rollouts", json=body)
    ask(guarded, "POST", "/v1/completions", json={**TEXT, "annealing": {"tau_max": 99}})
    ask(guarded, "POST", "/v1/completions", json={**TEXT, "n": 99})
    ask(guarded, "GET", "/no%0Asuch\nroute".replace("\n", "%0a"))

    after = {name: metric(guarded, name) - value for name, value in before.items()}
    assert list(after.values()) == [3, 45, 3, 3, 1, 1, len(answer.content)]
    lines = guarded.log.read_bytes()[size:].decode().splitlines()
    told = [json.loads(line) for line in lines if line.startswith('{"time"')]
    first = next(line for line in told if line["path"] == "/v1/rollouts")
    assert (first["answers"], first["tokens"], first["status"]) == (3, 45, 200)
    assert first["schedule"] == "ead step 5"
    assert first["bytes"] == len(answer.content)
    own = told[told.index(first) :]  # what was asked before may be told late
    assert [line["refused"] for line in own[1:4]] == ["schedule", "limit", "invalid"]


# --- dying, coming back, ending -----------------------------------------------------------------


def test_a_dead_scheduler_is_told_fast_and_replaced_and_the_end_is_in_time(
    tiny_model: Path, tmp_path: Path
) -> None:
    """One server: its scheduler is killed, it comes back, it is told to end while at work."""
    arguments = ["--model-path", str(tiny_model), *TINY_FLAGS, "--restart", "--drain-seconds", "3"]
    arguments += ["--max-total-tokens", "262144"]  # all of them at once
    long = {"annealing": FAST, "max_new_tokens": 3900, "ignore_eos": True}
    with (
        ServerProcess(arguments, tmp_path / "server.log") as server,
        Client(server.url, retries=0, timeout=120) as client,
        ThreadPoolExecutor(3) as pool,
    ):
        server.wait_until_ready()
        call = pool.submit(client.rollouts, ["x"], n=4, **long)
        wait_for(lambda: begins(client), 30)
        family = psutil.Process(server.process.pid).children(recursive=True)
        (scheduler,) = (p for p in family if "scheduler" in "".join(p.cmdline()))
        scheduler.kill()
        assert isinstance(call.exception(timeout=30), EadError)

        wait_for(lambda: answers_ready(server), 240)
        assert "starting it again" in server.log.read_text(errors="replace")
        assert len(client.rollouts(["x"], max_new_tokens=3).groups[0].answers) == 1

        # more than any machine finishes in three seconds
        call = pool.submit(client.rollouts, ["x"], n=48, **long)
        wait_for(lambda: begins(client), 30)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not answers_ready(server), 30)
        with pytest.raises(ServerUnavailable, match="shutting down"):
            client.complete("x", max_tokens=1)
        for answer in call.result(timeout=60).groups[0].answers:
            assert answer.finish_reason == "abort"
            assert answer.rollout is not None
            assert 0 < len(answer.rollout) < 3900
        assert server.process.wait(timeout=60) == 0
