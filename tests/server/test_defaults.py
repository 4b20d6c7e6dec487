"""The server's default schedule and training step, on a server with two tokenizer workers.

Its model's own generation_config asks for temperature 0.6, which must not multiply in, and its
tokenizer has no chat template.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.reference import TINY_FLAGS, Reference
from helpers.serving import LOGPROB_TOLERANCE, post

from ead_server.launch.process import ServerProcess

DEFAULT = {"schedule": "linear", "length": 8.0, "tau_max": 1.5, "tau_min": 0.5}
WORKERS = 2
ASKS_OFTEN_ENOUGH = 20  # connections, of which all reach the same worker once in 2^19


@pytest.fixture(scope="module")
def annealing_server(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    model = tmp_path_factory.mktemp("default") / "model"
    shutil.copytree(tiny_model, model)
    without_chat_template(model)
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    arguments = ["--model-path", str(model), *TINY_FLAGS, "--tokenizer-worker-num", str(WORKERS)]
    arguments += ["--annealing", json.dumps(DEFAULT)]
    with ServerProcess(arguments, model.parent / "server.log") as process:
        process.wait_until_ready()
        yield process


def without_chat_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    assert "chat_template" not in json.loads((model / "tokenizer_config.json").read_text())


def linear(t: int) -> float:
    return 1.5 + (0.5 - 1.5) * min(t / 8.0, 1.0)


def taus_of(answer: dict[str, Any], reference: Reference, taus: list[float]) -> list[float]:
    """Which of `taus` each token of a /generate answer was sampled at, by SGLang's logprobs."""
    entries = answer["meta_info"]["output_token_logprobs"]
    logits = reference.logits(PROMPT, answer["output_ids"])
    found = []
    for row, (logprob, token, _) in zip(logits, entries, strict=True):
        errors = [abs((row / tau).log_softmax(-1)[token].item() - logprob) for tau in taus]
        assert min(errors) < LOGPROB_TOLERANCE
        found.append(taus[errors.index(min(errors))])
    return found


PROMPT = [5, 6, 7]


@pytest.mark.parametrize("params", [{}, {"temperature": 1}, {"temperature": 1.0, "top_p": 1.0}])
def test_a_request_that_says_nothing_is_annealed(
    annealing_server: ServerProcess, reference: Reference, params: dict[str, Any]
) -> None:
    sampling = {"max_new_tokens": 12, "ignore_eos": True, **params}
    body = {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True}
    answer = post(annealing_server, "/generate", body)
    want = [linear(t) for t in range(12)]
    assert taus_of(answer, reference, [*want, 1.0, 0.6]) == want
    assert answer["meta_info"]["annealing"]["schedule"] == "linear"
    assert "temperatures" not in answer["meta_info"]  # nobody asked for arrays


@pytest.mark.parametrize(
    ("params", "tau"),
    [
        ({"temperature": 0.7}, 0.7),
        ({"annealing": None}, 1.0),
        ({"custom_params": {"annealing": None}}, 1.0),
    ],
)
def test_an_own_temperature_or_null_opts_out(
    annealing_server: ServerProcess, reference: Reference, params: dict[str, Any], tau: float
) -> None:
    sampling = {"max_new_tokens": 12, "ignore_eos": True, **params}
    body = {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True}
    answer = post(annealing_server, "/generate", body)
    assert taus_of(answer, reference, [tau, *(linear(t) for t in range(9))]) == [tau] * 12
    assert "annealing" not in answer["meta_info"]


@pytest.mark.parametrize("place", [{"annealing": None}, {"custom_params": {"annealing": None}}])
def test_null_opts_out_of_completions(
    annealing_server: ServerProcess, place: dict[str, Any]
) -> None:
    body = {"model": "tiny", "prompt": "def ", "max_tokens": 6, "ignore_eos": True, **place}
    choice = post(annealing_server, "/v1/completions", {**body, "rollout": False})["choices"][0]
    assert "rollout" not in choice
    choice = post(annealing_server, "/v1/completions", {**body, "rollout": True})["choices"][0]
    assert choice["rollout"]["annealing"] is None
    assert choice["rollout"]["temperatures"] == [1.0] * 6


def test_null_opts_out_of_rollouts(annealing_server: ServerProcess) -> None:
    params = {"max_new_tokens": 6, "ignore_eos": True}
    for said, want in (({"annealing": None}, [1.0] * 6), ({}, [linear(t) for t in range(6)])):
        body = {"prompts": ["def "], "sampling_params": params, **said}
        (group,) = post(annealing_server, "/v1/rollouts", body)["groups"]
        assert group["answers"][0]["temperatures"] == pytest.approx(want, abs=1e-6)
        assert (group["annealing"] is None) == bool(said)


def test_messages_want_a_chat_template_and_nothing_else_does(
    annealing_server: ServerProcess,
) -> None:
    """A sentence that says so, on every route; of several prompts the others are answered."""
    says = "Cannot use chat template functions because tokenizer.chat_template is not set"
    messages = [{"role": "user", "content": "hi"}]
    for route in ("/v1/chat/completions", "/v1/tokenize"):
        body = {"model": "tiny", "messages": messages, "max_tokens": 2}
        response = httpx.post(f"{annealing_server.url}{route}", json=body, timeout=60)
        assert response.status_code == 400
        assert response.json()["error"]["message"].startswith(says)
    body = {"prompts": [messages, "x"], "sampling_params": {"max_new_tokens": 2}}
    refused, answered = post(annealing_server, "/v1/rollouts", body)["groups"]
    assert refused["error"]["param"] == "prompts"
    assert refused["error"]["message"].startswith(f"prompts: cannot be tokenised: {says}")
    assert answered["error"] is None
    assert len(answered["answers"]) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_openai_answers_keep_their_shape_and_take_the_schedule(
    annealing_server: ServerProcess, reference: Reference, stream: bool
) -> None:
    """Without a temperature: SGLang would fill in the model's 0.6 before the engine sees it."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "ignore_eos": True, "logprobs": 1}
    body |= {"stream": stream, "return_token_ids": True}
    response = httpx.post(f"{annealing_server.url}/v1/completions", json=body, timeout=60)
    if stream:
        lines = [line[6:] for line in response.text.split("\n\n") if line.startswith("data: {")]
        choices = [json.loads(line)["choices"][0] for line in lines]
    else:
        choices = response.json()["choices"]
    assert not any("rollout" in choice for choice in choices)
    tokens = [t for choice in choices for t in choice.get("token_ids") or ()]
    parts = [choice["logprobs"]["token_logprobs"] for choice in choices if choice["logprobs"]]
    logprobs = [logprob for part in parts for logprob in part]
    assert len(tokens) == len(logprobs) == 12
    logits = reference.logits(PROMPT, tokens)
    for t, (logprob, token) in enumerate(zip(logprobs, tokens, strict=True)):
        want = (logits[t] / linear(t)).log_softmax(-1)[token].item()
        assert logprob == pytest.approx(want, abs=LOGPROB_TOLERANCE)


def test_the_arrays_come_when_asked_for_and_another_schedule_wins(
    annealing_server: ServerProcess,
) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 10, "ignore_eos": True}
    rollout = post(annealing_server, "/v1/completions", {**body, "rollout": True})
    got = rollout["choices"][0]["rollout"]
    assert got["temperatures"] == pytest.approx([linear(t) for t in range(10)], abs=1e-6)
    own = {"annealing": {"schedule": "constant", "tau": 0.9}}
    got = post(annealing_server, "/v1/completions", {**body, **own})["choices"][0]["rollout"]
    assert got["temperatures"] == pytest.approx([0.9] * 10, abs=1e-6)


@pytest.mark.parametrize("custom", [[1], "x", 7])
def test_a_default_does_not_turn_a_mistake_into_a_crash(
    annealing_server: ServerProcess, custom: Any
) -> None:
    for body, route in (
        (
            {"text": "x", "sampling_params": {"max_new_tokens": 2, "custom_params": custom}},
            "/generate",
        ),
        (
            {"model": "tiny", "prompt": "x", "max_tokens": 2, "custom_params": custom},
            "/v1/completions",
        ),
    ):
        response = httpx.post(f"{annealing_server.url}{route}", json=body, timeout=60)
        assert response.status_code < 500, (route, response.text)
    assert httpx.get(f"{annealing_server.url}/health", timeout=30).status_code == 200


def test_greedy_decoding_stays_greedy(annealing_server: ServerProcess, server: Any) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 10, "temperature": 0}
    texts = [
        post(each, "/v1/completions", body)["choices"][0]["text"]
        for each in (annealing_server, server)
    ]
    assert texts[0] == texts[1]


# --- the training step -------------------------------------------------------------------------


def steps_seen(server: ServerProcess) -> set[int]:
    """The step that schedules without one are given, by whichever worker answers."""
    body = {"text": "x", "sampling_params": {"max_new_tokens": 1, "annealing": {"decay": 5.0}}}
    return {
        post(server, "/generate", body)["meta_info"]["annealing"]["step"]
        for _ in range(ASKS_OFTEN_ENOUGH)
    }


def put_step(server: ServerProcess, body: Any) -> httpx.Response:
    return httpx.put(
        f"{server.url}/v1/annealing/step", json=body, headers=server.admin_headers, timeout=30
    )


def test_every_worker_uses_the_step_that_was_set_else_the_weight_updates(
    annealing_server: ServerProcess, tiny_model: Path
) -> None:
    url = annealing_server.url
    assert steps_seen(annealing_server) == {0}
    assert put_step(annealing_server, {"step": 7}).json() == {
        "step": 7,
        "set_to": 7,
        "weight_updates": 0,
    }
    assert steps_seen(annealing_server) == {7}
    own = {"text": "x", "sampling_params": {"max_new_tokens": 1, "annealing": {"step": 3}}}
    assert post(annealing_server, "/generate", own)["meta_info"]["annealing"]["step"] == 3

    for _ in range(2):
        body = {"model_path": str(tiny_model)}
        assert post(annealing_server, "/update_weights_from_disk", body)["success"]
    assert steps_seen(annealing_server) == {7}
    assert put_step(annealing_server, {"step": None}).json()["step"] == 2
    assert steps_seen(annealing_server) == {2}
    assert httpx.get(f"{url}/v1/annealing/step", timeout=30).json()["weight_updates"] == 2


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"step": -1}, "step", "greater than or equal to 0, got -1"),
        ({"step": 1.5}, "step", "valid integer, got 1.5"),
        ({"step": 10**10}, "step", "less than or equal to 1000000000"),
        ({}, "step", "required"),
        ({"step": 1, "s": 2}, "s", "not permitted"),
        ([1], "body", "valid dictionary"),
    ],
)
def test_a_bad_step_is_a_400_in_openai_shape(
    annealing_server: ServerProcess, body: Any, param: str, says: str
) -> None:
    before = httpx.get(f"{annealing_server.url}/v1/annealing/step", timeout=30).json()
    answer = put_step(annealing_server, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert httpx.get(f"{annealing_server.url}/v1/annealing/step", timeout=30).json() == before
