"""Logits that are no numbers fail the requests that they reach, and nobody else.

The server's model has NaN in the embedding of one token, so a request is bad as soon as that token
is in its prompt, or is generated.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from helpers.answers import events_of, gaps
from helpers.reference import TINY_FLAGS, Reference
from safetensors.torch import load_file, save_file

from ead_client import Client, ServerUnavailable
from ead_server.launch.process import ServerProcess

NAN = 700  # the token
SAYS = "the model's logits are not finite numbers"
LONG: dict[str, Any] = {
    "annealing": {"schedule": "linear", "length": 60.0, "step": 0},
    "logit_bias": {str(NAN): -1000.0},  # never generates the token
    "ignore_eos": True,
    "max_tokens": 60,
}
FORCED = {"logit_bias": {str(NAN): 1000.0}}  # which generates the token


@pytest.fixture(scope="module")
def broken(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("broken")
    model = shutil.copytree(tiny_model, folder / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][NAN] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    arguments = ["--model-path", str(model), *TINY_FLAGS]
    with ServerProcess(arguments, folder / "server.log") as process:
        process.wait_until_ready()
        yield process


@pytest.fixture
def others(broken: ServerProcess, reference: Reference) -> Iterator[Client]:
    """Four long answers are generated while a test runs; all of them come whole and exact."""
    with Client(broken.url, timeout=120, retries=0) as client, ThreadPoolExecutor(4) as pool:
        prompts = [[5 + number, 6, 7] for number in range(4)]
        asked = [pool.submit(client.complete, p, **LONG) for p in prompts]
        yield client
        for answer in asked:
            choice = answer.result().choices[0]
            assert choice.rollout is not None
            assert choice.finish_reason == "length"
            assert len(choice.rollout) == 60
            assert gaps(choice.rollout, reference.model).max() < 1e-4
        assert broken.process.poll() is None


SAMPLING: list[dict[str, Any]] = [
    {},
    {"annealing": {"tau_max": 1.5}},
    {"rollout": {"entropies": True}},
    {"annealing": {"schedule": "entropy"}, "rollout": False},
    {"top_p": 0.9, "top_k": 50},
    {"min_p": 0.1, "rollout": True},
    {"temperature": 0},
    {"logprobs": 3},
    {"n": 2},
]


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_prompt_is_a_typed_error_and_all_others_go_on(
    sampling: dict[str, Any], stream: bool, others: Client
) -> None:
    body = {"model": "m", "prompt": [5, NAN, 7], "max_tokens": 20, "stream": stream, **sampling}
    response = httpx.post(f"{others.base_url}/v1/completions", json=body, timeout=60)
    if stream:
        (event, *_) = [e for e in events_of(response) if e.get("object") == "error" or "error" in e]
        error = event.get("error", event)
    else:
        assert response.status_code == 500
        error = response.json().get("error") or response.json()
    assert SAYS in error["message"]
    assert "NaN" not in response.text.replace(error["message"], "")


@pytest.mark.parametrize("sampling", [{}, {"annealing": {}}, {"temperature": 0}], ids=str)
def test_numbers_that_go_bad_in_an_answer_end_it_before_they_show(
    sampling: dict[str, Any], others: Client
) -> None:
    """The first token is NAN, and sampled from good logits; the second one is not."""
    body = {"model": "m", "prompt": [5, 6], "max_tokens": 20, "stream": True, **FORCED, **sampling}
    response = httpx.post(f"{others.base_url}/v1/completions", json=body, timeout=60)
    events = events_of(response)
    assert SAYS in str(events[-1])
    tokens = [
        token
        for event in events[:-1]
        for choice in event["choices"]
        for token in (choice.get("rollout") or {}).get("token_ids", [])
    ]
    assert tokens in ([], [NAN])


def test_an_answer_of_our_route_is_an_error_in_openai_shape(others: Client) -> None:
    """Alone with its prompt, or one answer in a group of others."""
    groups = others.rollouts([[5, NAN], [5, 6]], n=2, max_new_tokens=5).groups
    for answer in groups[0].answers:
        assert answer.error is not None
        assert answer.error["type"] == "server_error"
        assert answer.error["code"] == 500
        assert SAYS in answer.error["message"]
    assert groups[1].error is None
    assert len(groups[1].answers) == 2

    body = {"prompts": [[5, 6]], "n": 2, "sampling_params": {"max_new_tokens": 5, **FORCED}}
    answers = httpx.post(f"{others.base_url}/v1/rollouts", json=body, timeout=60).json()
    assert SAYS in str(answers)


def test_the_client_names_it(others: Client) -> None:
    with pytest.raises(ServerUnavailable, match=SAYS):
        others.complete([NAN], annealing={}, max_tokens=3)


def test_a_grammar_is_no_bad_number_and_extremes_of_a_client_are_its_own(others: Client) -> None:
    """-Inf is what impossible tokens have; 1e9 is the largest number of any parameter."""
    url = f"{others.base_url}/generate"
    params: list[dict[str, Any]] = [
        {"regex": "[ab]{3}"},
        {"logit_bias": {str(token): 1e9 for token in range(20)}},
        {"logit_bias": {str(token): -1e9 for token in range(1000)}},
        {"repetition_penalty": 2.0, "frequency_penalty": 2.0, "presence_penalty": -2.0},
        {"logit_bias": {"7": 1e9}, "temperature": 1e-6},
        {"logit_bias": {"7": -1e9}, "temperature": 1e-9, "top_p": 1e-9},
    ]
    for param in params:
        body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 5, **param}}
        response = httpx.post(url, json=body, timeout=60)
        assert response.status_code == 200, (param, response.text)
        assert response.json()["meta_info"]["completion_tokens"] > 0
    extreme = {"logit_bias": {"7": 1e9, "8": 1e9}, "temperature": 1e-35}
    body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 5, **extreme}}
    assert httpx.post(url, json=body, timeout=60).status_code in (200, 400, 500)


def test_what_a_bad_request_computed_is_not_found_again(broken: ServerProcess) -> None:
    """Its keys and values do not stay in the cache for others that begin alike."""
    url = f"{broken.url}/generate"
    prompt = list(range(100, 300))
    for _ in range(2):
        body = {"input_ids": [*prompt, NAN], "sampling_params": {"max_new_tokens": 3}}
        assert httpx.post(url, json=body, timeout=60).status_code == 500
    body = {"input_ids": [*prompt, 5], "sampling_params": {"max_new_tokens": 3}}
    answer = httpx.post(url, json=body, timeout=60)
    assert answer.status_code == 200
    assert answer.json()["meta_info"]["cached_tokens"] == 0
