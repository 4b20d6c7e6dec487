"""The edge of `ead serve`: keys, limits, what is never loaded, and how it ends and comes back."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import TINY_FLAGS
from test_server import FAST

from ead_client import Client, EadError, ServerUnavailable
from ead_server.process import ServerProcess
from ead_server.settings import Settings

KEY = "an-api-key-that-must-not-show"
LIMITS = ["--max-body-bytes", "20000", "--max-answers", "8", "--max-n", "4"]
ADMIN_ROUTES = [
    ("POST", "/update_weights_from_disk"),
    ("POST", "/update_weights_from_tensor"),
    ("POST", "/init_weights_update_group"),
    ("POST", "/begin_weight_update"),
    ("GET", "/get_weights_by_name"),
    ("POST", "/abort_request"),
    ("POST", "/pause_generation"),
    ("POST", "/continue_generation"),
    ("GET", "/flush_cache"),
    ("POST", "/start_profile"),
    ("POST", "/set_internal_state"),
    ("POST", "/load_lora_adapter"),
    ("POST", "/configure_logging"),
    ("PUT", "/v1/annealing"),
    ("PUT", "/v1/annealing/step"),
    ("POST", "/v1/weights/tensors"),
    ("POST", "/v1/weights/disk"),
    ("POST", "/v1/weights/distributed"),
]
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


def ask(
    server: ServerProcess, method: str, path: str, key: str | None = KEY, **options: Any
) -> httpx.Response:
    headers = {"accept-encoding": "identity"}
    headers |= {"authorization": f"Bearer {key}"} if key else {}
    return httpx.request(method, server.url + path, headers=headers, timeout=60, **options)


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


def test_without_an_admin_key_what_changes_the_server_is_closed() -> None:
    """The decision alone, on SGLang's own routes: no key, whoever asks, opens them."""
    from ead_server.guard import Guard

    guard = Guard(lambda *_: None)  # type: ignore[arg-type, return-value]
    guard._admin_paths = frozenset({"/flush_cache"})
    settings = Settings.model_validate({})
    for key in (b"", b"Bearer ", b"Bearer None", b"Bearer x"):
        scope = {"headers": [(b"authorization", key)]}
        refusal = guard._refused_key(settings, "POST", "/flush_cache", scope)
        assert refusal is not None
        assert refusal.status == 403
        assert "--admin-api-key" in refusal.message
        assert guard._refused_key(settings, "POST", "/generate", scope) is None


def test_keys_show_nowhere(guarded: ServerProcess) -> None:
    """Neither ours nor the one that SGLang's warm-up was given opens anything it should not."""
    info = ask(guarded, "GET", "/server_info")
    assert info.status_code == 200
    secrets = [KEY, guarded.admin_api_key]
    log = guarded.log.read_text(errors="replace")
    for text in (info.text, log, ask(guarded, "GET", "/metrics").text):
        for secret in secrets:
            assert secret not in text
    assert "server_args=" in log or "ServerArgs(" in log  # SGLang does print what it was given
    leaked = info.json().get("api_key")
    assert leaked
    assert ask(guarded, "GET", "/v1/models", leaked).status_code == 401
    assert ask(guarded, "POST", "/flush_cache", leaked).status_code == 401
    settings = Settings.model_validate({"api_key": KEY, "admin_api_key": "adm-secret"})
    assert KEY not in repr(settings)
    assert "adm-secret" not in str(settings)


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
        ("/generate", {**NATIVE, "text": ""}, "prompt: must have at least one token"),
        ("/generate", {**NATIVE, "custom_logit_processor": "x"}, "is refused: it is code"),
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


def metric(server: ServerProcess, line: str) -> float:
    text = ask(server, "GET", "/metrics").text
    values = [row.rpartition(" ")[2] for row in text.splitlines() if row.startswith(line + " ")]
    return float(values[0]) if values else 0.0


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
    assert [line["refused"] for line in told[1:4]] == ["schedule", "limit", "invalid"]


# --- dying, coming back, ending -----------------------------------------------------------------


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def answers_ready(server: ServerProcess) -> bool:
    try:
        return httpx.get(f"{server.url}/health/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def begins(client: Client) -> bool:
    """Whether the engine is at work."""
    loads = client.request("GET", "/v1/loads").json()["loads"]
    return any(load["num_running_reqs"] for load in loads)


def test_a_dead_scheduler_is_told_fast_and_replaced_and_the_end_is_in_time(
    tiny_model: Path, tmp_path: Path
) -> None:
    """One server: its scheduler is killed, it comes back, it is told to end while at work."""
    arguments = ["--model-path", str(tiny_model), *TINY_FLAGS, "--restart", "--drain-seconds", "3"]
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

        calls = [pool.submit(client.rollouts, ["x"], n=2, **long) for _ in range(2)]
        wait_for(lambda: begins(client), 30)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not answers_ready(server), 30)
        with pytest.raises(ServerUnavailable, match="shutting down"):
            client.complete("x", max_tokens=1)
        for call in calls:
            for answer in call.result(timeout=60).groups[0].answers:
                assert answer.finish_reason == "abort"
                assert answer.rollout is not None
                assert 0 < len(answer.rollout) < 3900
        assert server.process.wait(timeout=60) == 0
