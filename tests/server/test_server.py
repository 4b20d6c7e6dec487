"""What a real SGLang server samples and returns, against independent computations.

Tolerances: both sides compute in float32 on the tiny model; the comparisons below are in float64.
Logits agree to a few 1e-6, and dividing by the smallest temperature used here (0.3) and summing
over the vocabulary leaves less than 1e-4 in a log-probability.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from helpers.answers import UNLIKELY, surprise
from helpers.reference import Reference
from helpers.serving import (
    FAST,
    LOGPROB_TOLERANCE,
    check_against_reference,
    expected_temperatures,
    post,
)
from scipy import stats

from ead_client import AsyncClient, Client, Rollout
from ead_sampler import parse_annealing
from ead_server.launch.process import ServerProcess


def surprise_of(rollouts: Sequence[Rollout], reference: Reference) -> float:
    """Whether the tokens were drawn at the temperatures told, see `surprise`."""
    rows = []
    for rollout in rollouts:
        logits = reference.logits(rollout.prompt_token_ids, rollout.token_ids)
        tau = torch.from_numpy(rollout.temperatures).double().unsqueeze(1)
        rows.append((logits / tau).log_softmax(-1))
    return surprise(rows, [rollout.token_ids for rollout in rollouts])


# --- temperatures and log-probabilities ------------------------------------------------------


def test_concurrent_requests_each_follow_their_own_schedule(
    client: Client, reference: Reference
) -> None:
    """Different schedules, lengths and prompts in one running batch, plain requests among them."""
    info = client.request("GET", "/server_info").json()
    assert info["disable_overlap_schedule"] is False  # where req.output_ids lags by a step
    schedules: list[dict[str, Any] | None] = [
        FAST,
        {"preset": "paper", "step": 0},
        {"tau_max": 2.0, "tau_min": 1.1, "decay": 7.0, "warmup": 0, "step": 0},
        {"decay": 10.0, "decay_growth": 5.0, "step": 3, "warmup": 1},
        {**FAST, "position_offset": 15},
        None,  # records only, at its own temperature
        {"tau_max": 0.5, "tau_min": 0.5, "warmup": 0, "step": 1},
        None,
    ] * 3

    def one(index: int) -> Rollout:
        schedule = schedules[index]
        fields = {} if schedule else {"temperature": 0.7}
        answer = client.complete(
            "def temperatures(self) " * (1 + index),
            annealing=schedule,
            rollout={"entropies": True},
            max_tokens=5 + 9 * (index % 7),
            ignore_eos=True,
            **fields,
        )
        assert answer.choices[0].rollout is not None
        return answer.choices[0].rollout

    with ThreadPoolExecutor(len(schedules)) as pool:
        rollouts = list(pool.map(one, range(len(schedules))))

    for index, (schedule, rollout) in enumerate(zip(schedules, rollouts, strict=True)):
        assert len(rollout) == 5 + 9 * (index % 7)
        want = expected_temperatures(schedule, len(rollout)) if schedule else [0.7] * len(rollout)
        assert np.abs(rollout.temperatures - want).max() < 1e-6
        applied = schedule and parse_annealing(schedule).model_dump()
        assert rollout.annealing == applied
        check_against_reference(rollout, reference)
    assert abs(surprise_of(rollouts, reference)) < UNLIKELY


def test_sampled_frequencies_fit_the_temperature_and_not_temperature_one(
    client: Client, reference: Reference
) -> None:
    """20,000 draws of one token at tau = 0.5, Pearson's chi-square over bins of >= 10 expected.

    The test fails by chance once in a million runs. Against temperature 1 it must reject at 1e-12.
    """
    schedule = {"tau_max": 0.5, "tau_min": 0.5, "warmup": 0, "step": 0}
    prompt = reference.tokenizer("def ")["input_ids"]
    draws: list[int] = []
    while len(draws) < 20_000:
        answer = client.complete([prompt] * 50, annealing=schedule, n=50, max_tokens=1)
        for choice in answer.choices:
            assert choice.rollout is not None
            assert choice.rollout.temperatures.tolist() == [0.5]
            draws.append(int(choice.rollout.token_ids[0]))
    logits = reference.logits(prompt, [0])[0]
    counts = np.bincount(draws, minlength=len(logits))

    def p_value(tau: float) -> float:
        expected = (logits / tau).softmax(-1).numpy() * len(draws)
        order = np.argsort(-expected)
        keep = order[expected[order] >= 10]
        rest = order[len(keep) :]
        observed = np.append(counts[keep], counts[rest].sum())
        wanted = np.append(expected[keep], expected[rest].sum())
        return float(stats.chisquare(observed, wanted).pvalue)

    assert p_value(0.5) > 1e-6
    assert p_value(1.0) < 1e-12


CUTS: list[dict[str, Any]] = [
    {"top_k": 5},
    {"top_p": 0.4},
    {"min_p": 0.3},
    {"top_k": 20, "top_p": 0.6, "min_p": 0.1},
    {},
    {"top_k": 3},
]


def test_logprobs_are_renormalised_over_what_the_cuts_keep(
    client: Client, reference: Reference
) -> None:
    """All in one batch, beside a greedy request: each row with its own cuts."""

    def one(index: int) -> Rollout:
        fields = {"annealing": FAST, **CUTS[index]} if index < len(CUTS) else {"temperature": 0}
        answer = client.complete(
            f"class {index}", rollout=True, max_tokens=60, ignore_eos=True, **fields
        )
        assert answer.choices[0].rollout is not None
        return answer.choices[0].rollout

    with ThreadPoolExecutor(len(CUTS) + 1) as pool:
        *rollouts, greedy = pool.map(one, range(len(CUTS) + 1))
    assert greedy.logprobs.tolist() == greedy.temperatures.tolist() == [0.0] * 60
    for cuts, rollout in zip(CUTS, rollouts, strict=True):
        assert rollout.sampling == {"top_p": 1.0, "top_k": -1, "min_p": 0.0, **cuts}
        taus = expected_temperatures(FAST, 60)
        assert np.abs(rollout.temperatures - taus).max() < 1e-6
        logits = reference.logits(rollout.prompt_token_ids, rollout.token_ids)
        for t, token in enumerate(rollout.token_ids):
            probs = (logits[t] / taus[t]).softmax(-1).numpy()
            order = np.argsort(-probs)
            ordered = probs[order]
            kept = np.cumsum(ordered) - ordered <= cuts.get("top_p", 1.0)
            kept &= np.arange(len(ordered)) < cuts.get("top_k", len(ordered))
            kept &= ordered >= ordered[0] * cuts.get("min_p", 0.0)
            assert int(token) in order[kept].tolist()
            want = math.log(probs[token] / ordered[kept].sum())
            assert abs(rollout.logprobs[t] - want) < LOGPROB_TOLERANCE


def test_greedy_is_reported_as_temperature_zero(client: Client) -> None:
    answer = client.complete("class ", rollout=True, temperature=0, max_tokens=5)
    rollout = answer.choices[0].rollout
    assert rollout is not None
    assert rollout.temperatures.tolist() == [0.0] * len(rollout)
    assert rollout.logprobs.tolist() == [0.0] * len(rollout)
    assert (rollout.model_logprobs < -0.01).any()


# --- the shape of answers ----------------------------------------------------------------------


def test_every_prompt_and_sample_gets_its_own_arrays(client: Client, reference: Reference) -> None:
    prompts = [reference.tokenizer(text)["input_ids"] for text in ("def ", "class Choice", "for")]
    answer = client.complete(prompts, annealing=FAST, n=3, max_tokens=12)
    assert [choice.index for choice in answer.choices] == list(range(9))
    for choice in answer.choices:
        rollout = choice.rollout
        assert rollout is not None
        assert rollout.prompt_token_ids is not None
        assert rollout.prompt_token_ids.tolist() == prompts[choice.index // 3]
        assert rollout.finish_reason == choice.finish_reason
        want = expected_temperatures(FAST, len(rollout))
        assert np.abs(rollout.temperatures - want).max() < 1e-6
        check_against_reference(rollout, reference)
    assert len({tuple(choice.rollout.token_ids) for choice in answer.choices if choice.rollout}) > 3


def test_lengths_are_equal_whatever_ends_the_answer(client: Client, reference: Reference) -> None:
    """Rollout itself refuses columns of different lengths; here against the token count."""
    frequent = reference.tokenizer.convert_ids_to_tokens(list(range(300, 400)))
    endings: list[dict[str, Any]] = [
        {"max_tokens": 1},
        {"max_tokens": 40, "stop": ["e", "s"]},
        {"max_tokens": 40, "stop_token_ids": list(range(3, 200))},
        {"max_tokens": 40, "logit_bias": {"2": 8.0}},  # the end-of-sequence token
        {"max_tokens": 40, "regex": "(ab|c){3}"},
        {"max_tokens": 40, "min_tokens": 20, "stop": [frequent[0]]},
    ]
    reasons = set()
    for fields in endings:
        answer = client.chat([{"role": "user", "content": "hi"}], annealing=FAST, n=4, **fields)
        total = 0
        for choice in answer.choices:
            assert choice.rollout is not None
            total += len(choice.rollout)
            want = expected_temperatures(FAST, len(choice.rollout))
            assert np.abs(choice.rollout.temperatures - want).max() < 1e-6
            reasons.add(choice.finish_reason)
        assert answer.usage is not None
        assert answer.usage["completion_tokens"] == total
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_carries_every_token_once(client: Client, reference: Reference, n: int) -> None:
    parts: dict[int, list[Rollout]] = {}
    reasons: dict[int, str] = {}
    for chunk in client.stream_chat(
        [{"role": "user", "content": "hello"}], annealing=FAST, n=n, max_tokens=30, ignore_eos=True
    ):
        for choice in chunk.choices:
            if choice.rollout is not None:
                parts.setdefault(choice.index, []).append(choice.rollout)
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
    assert reasons == dict.fromkeys(range(n), "length")
    for chunks in parts.values():
        assert len(chunks) > 3
        whole = chunks[-1].model_copy(
            update={
                name: np.concatenate([getattr(chunk, name) for chunk in chunks])
                for name in ("token_ids", "temperatures", "logprobs", "model_logprobs")
            }
        )
        assert len(whole) == 30
        assert np.abs(whole.temperatures - expected_temperatures(FAST, 30)).max() < 1e-6
        check_against_reference(whole, reference)


def test_a_stream_of_completions_carries_every_token_once_too(
    server: ServerProcess, reference: Reference
) -> None:
    """Two prompts times two answers, whose chunks are mixed."""
    prompts = [reference.tokenizer(text)["input_ids"] for text in ("def ", "class Choice")]
    body = {"model": "tiny", "prompt": prompts, "n": 2, "max_tokens": 20, "ignore_eos": True}
    answers: dict[int, dict[str, Any]] = {index: {} for index in range(4)}
    with httpx.stream(
        "POST",
        f"{server.url}/v1/completions",
        json={**body, "annealing": FAST, "stream": True},
        timeout=60,
    ) as response:
        for line in response.iter_lines():
            for choice in json.loads(line[6:])["choices"] if line.startswith("data: {") else ():
                for name, value in (choice.get("rollout") or {}).items():
                    told = answers[choice["index"]]
                    more = isinstance(value, list) and name != "prompt_token_ids"
                    told[name] = told.get(name, []) + value if more else value
    for index, told in answers.items():
        rollout = Rollout.model_validate(told)
        assert len(rollout) == 20
        assert rollout.prompt_token_ids is not None
        assert rollout.prompt_token_ids.tolist() == prompts[index // 2]
        assert np.abs(rollout.temperatures - expected_temperatures(FAST, 20)).max() < 1e-6
        check_against_reference(rollout, reference)


def test_the_async_client_runs_many_requests_at_once(
    server: ServerProcess, reference: Reference
) -> None:
    async def all_of_them() -> list[Rollout | None]:
        async with AsyncClient(server.url) as client:
            calls = [
                client.complete(f"def f{i}(", annealing={**FAST, "warmup": i}, max_tokens=8 + i)
                for i in range(8)
            ]
            return [answer.choices[0].rollout for answer in await asyncio.gather(*calls)]

    for index, rollout in enumerate(asyncio.run(all_of_them())):
        assert rollout is not None
        want = expected_temperatures({**FAST, "warmup": index}, len(rollout))
        assert np.abs(rollout.temperatures - want).max() < 1e-6
        check_against_reference(rollout, reference)


def entries_of(logprobs: Any, *, chat: bool) -> list[tuple[float, float, float]]:
    """(temperature, model_logprob, logprob) of each token, from OpenAI's object."""
    if chat:
        return [(e.temperature, e.model_logprob, e.logprob) for e in logprobs.content]
    columns = (logprobs.temperatures, logprobs.model_logprobs, logprobs.token_logprobs)
    return list(zip(*columns, strict=True))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_the_openai_client_has_every_field_on_its_own_objects(
    server: ServerProcess, reference: Reference, chat: bool, stream: bool, asynchronous: bool
) -> None:
    fields: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "n": 2, "stream": stream}
    fields["extra_body"] = {"annealing": FAST, "ignore_eos": True}
    if stream:
        fields["stream_options"] = {"include_usage": True}
    if chat:
        fields |= {"messages": [{"role": "user", "content": "hello"}], "logprobs": True}
    else:
        fields |= {"prompt": ["def ", "class "], "logprobs": 0}
    to = {"base_url": f"{server.url}/v1", "api_key": "none"}

    def ask() -> list[Any]:
        with openai.OpenAI(**to) as official:
            answer = (official.chat.completions if chat else official.completions).create(**fields)
            return list(answer) if stream else [answer]

    async def ask_asynchronously() -> list[Any]:
        async with openai.AsyncOpenAI(**to) as official:
            calls = official.chat.completions if chat else official.completions
            answer = await calls.create(**fields)
            return [part async for part in answer] if stream else [answer]

    parts = asyncio.run(ask_asynchronously()) if asynchronous else ask()
    rollouts: dict[int, list[dict[str, Any]]] = {}
    entries: dict[int, list[tuple[float, float, float]]] = {}
    for choice in (choice for part in parts for choice in part.choices):
        if hasattr(choice, "rollout"):
            rollouts.setdefault(choice.index, []).append(choice.rollout)
        if choice.logprobs is not None:
            entries.setdefault(choice.index, []).extend(entries_of(choice.logprobs, chat=chat))

    answers = 2 if chat else 4
    assert sorted(rollouts) == sorted(entries) == list(range(answers))
    for index, chunks in rollouts.items():
        names = ("token_ids", "temperatures", "logprobs", "model_logprobs")
        columns = {name: [value for chunk in chunks for value in chunk[name]] for name in names}
        rollout = Rollout.model_validate({**chunks[-1], **columns})
        assert rollout.annealing == parse_annealing(FAST).model_dump()
        assert np.abs(rollout.temperatures - expected_temperatures(FAST, 12)).max() < 1e-6
        check_against_reference(rollout, reference)
        recorded = iter(zip(*(columns[name] for name in names[1:]), strict=True))
        for entry in entries[index]:
            assert any((tau, model, mu) == pytest.approx(entry) for tau, mu, model in recorded)
        # SGLang drops the entries of a chat's chunks without text, never the arrays
        assert len(entries[index]) == 12 or (chat and stream)
    *before, last = parts
    assert last.usage.completion_tokens == 12 * answers
    if stream:
        assert last.choices == []
        assert {part.usage for part in before} == {None}


def test_completions_logprobs_gain_columns(server: ServerProcess) -> None:
    body = {"model": "tiny", "prompt": "def ", "max_tokens": 6, "logprobs": 1, "annealing": FAST}
    for echo in (False, True):
        choice = post(server, "/v1/completions", {**body, "echo": echo, "ignore_eos": True})[
            "choices"
        ][0]
        logprobs, rollout = choice["logprobs"], choice["rollout"]
        length = len(logprobs["tokens"])
        assert len(logprobs["temperatures"]) == len(logprobs["model_logprobs"]) == length
        assert logprobs["temperatures"][-6:] == rollout["temperatures"]
        assert logprobs["model_logprobs"][-6:] == rollout["model_logprobs"]
        assert logprobs["temperatures"][:-6] == [None] * (length - 6)


@pytest.mark.parametrize("stream", [False, True])
def test_generate_returns_the_arrays_in_meta_info(server: ServerProcess, stream: bool) -> None:
    prompts = ["def ", "class ", "for"]
    each = [
        {"max_new_tokens": 8, "ignore_eos": True, "annealing": FAST},
        {"max_new_tokens": 8, "ignore_eos": True},
        {"max_new_tokens": 8, "ignore_eos": True, "rollout": {"entropies": True}},
    ]
    body = {"text": prompts, "sampling_params": each, "return_logprob": True, "stream": stream}
    if stream:
        answers: dict[int, Any] = {}
        with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=60) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    item = json.loads(line[6:])
                    answers[item["index"]] = item
        metas = [answers[index]["meta_info"] for index in range(3)]
    else:
        metas = [answer["meta_info"] for answer in post(server, "/generate", body)]
    annealed, plain, recorded = metas
    assert annealed["temperatures"] == pytest.approx(expected_temperatures(FAST, 8), abs=1e-6)
    assert annealed["annealing"] == parse_annealing(FAST).model_dump()
    assert annealed["logprobs"] == pytest.approx(
        [logprob for logprob, *_ in annealed["output_token_logprobs"]], abs=1e-6
    )
    assert recorded["temperatures"] == [1.0] * 8
    assert recorded["annealing"] is None
    assert len(recorded["entropies"]) == 8
    ours = {"temperatures", "logprobs", "model_logprobs", "entropies", "annealing", "sampling"}
    assert not ours & set(plain)


def test_the_schedule_also_passes_where_routers_and_trainers_put_it(
    server: ServerProcess,
) -> None:
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 6, "ignore_eos": True}
    through_router = {**body, "chat_template_kwargs": {"annealing": FAST}}
    answer = post(server, "/v1/chat/completions", through_router)
    want = pytest.approx(expected_temperatures(FAST, 6), abs=1e-6)
    assert answer["choices"][0]["rollout"]["temperatures"] == want
    params = {"max_new_tokens": 6, "ignore_eos": True, "custom_params": {"annealing": FAST}}
    meta = post(server, "/generate", {"text": "hi", "sampling_params": params})["meta_info"]
    assert meta["temperatures"] == want


def test_asking_for_nothing_gets_nothing_wherever_it_is_said(server: ServerProcess) -> None:
    ours = {"temperatures", "logprobs", "model_logprobs", "annealing", "sampling"}
    for nothing in ({"rollout": False}, {"annealing": None}, {"annealing": None, "rollout": None}):
        for place in (nothing, {"custom_params": nothing}):
            params = {"max_new_tokens": 3, "ignore_eos": True, **place}
            meta = post(server, "/generate", {"text": "hi", "sampling_params": params})["meta_info"]
            assert not ours & set(meta), place


def test_an_empty_rollout_object_asks_for_a_rollout(server: ServerProcess) -> None:
    body = {"model": "tiny", "prompt": "def ", "max_tokens": 3, "ignore_eos": True, "rollout": {}}
    rollout = post(server, "/v1/completions", body)["choices"][0]["rollout"]
    assert len(rollout["temperatures"]) == 3
    assert rollout["annealing"] is None
    params = {"max_new_tokens": 3, "ignore_eos": True, "custom_params": {"rollout": {}}}
    meta = post(server, "/generate", {"text": "hi", "sampling_params": params})["meta_info"]
    assert len(meta["temperatures"]) == 3
    assert meta["sampling"]["top_k"] == -1


# --- bad requests ------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
BAD = [
    ({"annealing": {"tau_max": 99}}, "annealing.tau_max", "[0.01, 10.0], got 99"),
    ({"annealing": {"tau": 1}}, "annealing.tau", "unknown key"),
    ({"annealing": [1]}, "annealing", "must be an object, got [1]"),
    ({"annealing": {}, "temperature": 0.7}, "temperature", "absent or 1"),
    ({"annealing": {}, "temperature": 0}, "temperature", "absent or 1"),
    ({"annealing": {}, "top_k": 1}, "top_k", "greedy"),
    ({"annealing": {}, "beam_width": 2}, "beam_width", "must be 1 or absent"),
    ({"annealing": {}, "custom_params": [1]}, "custom_params", "must be an object, got [1]"),
    ({"rollout": "yes"}, "rollout", "must be a boolean"),
    ({"rollout": {"entropies": 1}}, "rollout.entropies", "must be a boolean, got 1"),
]


@pytest.mark.parametrize(("fields", "param", "says"), BAD)
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/generate"])
def test_a_bad_field_is_a_400_in_openai_shape(
    server: ServerProcess, route: str, fields: dict[str, Any], param: str, says: str
) -> None:
    body: dict[str, Any] = {"model": "tiny", **CHAT, **fields}
    if route == "/v1/completions":
        body = {"model": "tiny", "prompt": "hi", "max_tokens": 4, **fields}
    elif route == "/generate":
        body = {"text": "hi", "sampling_params": {"max_new_tokens": 4, **fields}}
    response = httpx.post(server.url + route, json=body, timeout=60)
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "custom",
    [
        {"annealing": {"tau_max": 1e9}},
        {"annealing": {"a": {"b": 1}}},
        {"annealing": "ead"},
        {"annealing": [[1]]},
        {"annealing": {}, "rollout": 3},
        {"rollout": [[1]]},
        {"rollout": 0},
    ],
)
def test_malformed_custom_params_are_refused_and_the_server_lives(
    server: ServerProcess, client: Client, custom: dict[str, Any]
) -> None:
    body = {"text": "hi", "sampling_params": {"max_new_tokens": 4, "custom_params": custom}}
    response = httpx.post(f"{server.url}/generate", json=body, timeout=60)
    assert response.status_code == 400
    assert "Traceback" not in response.text
    assert client.complete("hi", annealing=FAST, max_tokens=2).choices


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_a_field_is_heard_however_json_spells_it(server: ServerProcess, route: str) -> None:
    prompt = {"prompt": "hi"} if route == "/v1/completions" else CHAT
    body = json.dumps({"model": "tiny", "max_tokens": 4, **prompt, "annealing": {"tau_max": 99}})
    raw = body.replace('"annealing"', r'"\u0061nnealing"')
    response = httpx.post(server.url + route, content=raw, timeout=60)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "annealing.tau_max"


def test_not_json_is_a_400(server: ServerProcess) -> None:
    raw = b'{"annealing": {"tau_max": NaN}}'
    response = httpx.post(f"{server.url}/v1/completions", content=raw, timeout=60)
    assert response.status_code == 400
    assert "not valid JSON" in response.json()["error"]["message"]


def test_errors_of_sglang_keep_openai_shape(server: ServerProcess) -> None:
    body = {"model": "tiny", "prompt": "hi", "max_tokens": -5, "annealing": FAST}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
