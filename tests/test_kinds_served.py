"""Every kind of schedule on a real server, all in one running batch, also while it is unsettled."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Reference
from helpers.answers import UNLIKELY, surprise
from test_kinds import walk
from test_server import LOGPROB_TOLERANCE, post

from ead_client import Client, RequestRefused, Rollout
from ead_sampler import REGISTRY
from ead_server.launch.process import ServerProcess

# token ids made likely below, so that segments do begin and end: an answer of 40 tokens lacks END
# 4 times in 10,000 (simulated with the reference), and two answers, as asked for here, once in 5e6
MARK, END = 40, 41
BIAS = {MARK: 7.5, END: 8.0}
SEGMENT = {
    "schedule": "segment",
    "thinking": {"schedule": "linear", "length": 40.0, "tau_min": 0.5},
    "restart_token_ids": [MARK],
}
SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "ead", "preset": "paper", "tau_min": 0.4},
    {"schedule": "reverse", "preset": "paper", "tau_min": 0.4},
    {"schedule": "constant", "tau": 0.8},
    {"schedule": "linear", "length": 30.0, "tau_min": 0.4},
    {"schedule": "cosine", "length": 30.0, "tau_min": 0.4},
    {"schedule": "exponential", "length": 30.0, "tau_min": 0.4},
    {"schedule": "two_stage", "switch": 11, "tau_min": 0.4},
    {"schedule": "piecewise", "knots": [[2.0, 0.7], [9.0, 1.4], [30.0, 0.4]]},
    {"schedule": "entropy", "entropy_scale": 8.0, "exponent": 2.0, "tau_min": 0.4},
    {"schedule": "ead+entropy", "preset": "paper", "entropy_scale": 8.0, "tau_min": 0.4},
    {"schedule": "branch", "threshold": 5.0, "rate": 0.3, "top": 0.5, "tau_min": 0.5},
    SEGMENT,
    {
        **SEGMENT,
        "answer": {"schedule": "entropy", "entropy_scale": 8.0, "tau_min": 0.5},
        "end_of_thinking_token_ids": [END],
    },
]


# what they do next depends on the tokens and entropies so far
WITH_STATE = [raw for raw in SCHEDULES if raw["schedule"] in ("branch", "segment")]


def check_all_kinds(
    server: ServerProcess,
    reference: Reference,
    count: int,
    schedules: Sequence[dict[str, Any]] = SCHEDULES,
) -> None:
    """`count` answers at once, one schedule after the other."""

    def one(index: int) -> Rollout:
        with Client(server.url, timeout=240) as client:
            answer = client.complete(
                "def evaluate(t) " * (1 + 6 * (index % 5)),  # some longer than chunks elsewhere
                annealing={**schedules[index % len(schedules)], "step": 0},
                rollout={"entropies": True},
                max_tokens=40 + index % 7,
                ignore_eos=True,
                logit_bias={str(token): bias for token, bias in BIAS.items()},
            )
        assert answer.choices[0].rollout is not None
        return answer.choices[0].rollout

    with ThreadPoolExecutor(count) as pool:
        rollouts = list(pool.map(one, range(count)))
    restarts = ends = 0
    hot: list[float] = []
    behaviour = []
    for index, rollout in enumerate(rollouts):
        raw = schedules[index % len(schedules)]
        assert len(rollout) == 40 + index % 7
        assert rollout.entropies is not None
        assert rollout.annealing is not None
        assert rollout.annealing["schedule"] == raw["schedule"]
        tokens, entropies = rollout.token_ids.tolist(), rollout.entropies.tolist()
        want = walk(raw, tokens, entropies)
        assert np.abs(rollout.temperatures - want).max() < 1e-5, raw
        logits = reference.logits(rollout.prompt_token_ids, rollout.token_ids)
        model = logits.log_softmax(-1)
        h = -(model.exp() * model).sum(-1).numpy()
        assert np.abs(rollout.entropies - h).max() < LOGPROB_TOLERANCE
        picked = model.numpy()[np.arange(len(tokens)), tokens]
        assert np.abs(rollout.model_logprobs - picked).max() < LOGPROB_TOLERANCE
        logits[:, MARK] += BIAS[MARK]  # which the sampler draws from, the model knows nothing of it
        logits[:, END] += BIAS[END]
        mu = (logits / torch.tensor(want, dtype=logits.dtype).unsqueeze(1)).log_softmax(-1)
        picked = mu.numpy()[np.arange(len(tokens)), tokens]
        assert np.abs(rollout.logprobs - picked).max() < LOGPROB_TOLERANCE, raw
        behaviour.append(mu)
        if raw["schedule"] == "segment":
            restarts += MARK in tokens[:-1]
            ends += "answer" in raw and END in tokens[:-1]
        if raw["schedule"] == "branch":
            hot += [tau for tau in want if tau > 1]
    z = surprise(behaviour, [rollout.token_ids for rollout in rollouts])
    assert abs(z) < UNLIKELY
    assert restarts  # or these tests have shown less than they say
    assert ends
    assert hot


def test_all_kinds_in_one_batch(server: ServerProcess, reference: Reference) -> None:
    assert {raw["schedule"] for raw in SCHEDULES} == set(REGISTRY)
    check_all_kinds(server, reference, 3 * len(SCHEDULES))


def test_mean_matched_temperatures_have_that_mean(client: Client) -> None:
    matched = {"temperature": 0.9, "tokens": 30}
    for raw in ({"schedule": "linear", "length": 20.0}, {"preset": "paper"}):
        rollout = (
            client.complete(
                "x",
                annealing={**raw, "mean_matched": matched},
                max_tokens=30,
                ignore_eos=True,
            )
            .choices[0]
            .rollout
        )
        assert rollout is not None
        assert rollout.temperatures.mean() == pytest.approx(0.9, abs=1e-6)


def test_strings_become_the_tokens_that_contain_them(client: Client, reference: Reference) -> None:
    tokenizer = reference.tokenizer
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    string = "e"
    ids = [i for i, text in enumerate(texts) if string in text]
    assert 1 < len(ids) < len(texts) / 2
    schedule = {"schedule": "segment", "thinking": {"schedule": "linear", "length": 40.0}}
    rollout = (
        client.complete(
            "x",
            annealing={**schedule, "restart_strings": [string]},
            rollout={"entropies": True},
            max_tokens=60,
            ignore_eos=True,
        )
        .choices[0]
        .rollout
    )
    assert rollout is not None
    assert rollout.annealing is not None
    assert rollout.annealing["restart_token_ids"] == ids
    tokens = rollout.token_ids.tolist()
    assert set(tokens[:-1]) & set(ids)
    want = walk({**schedule, "restart_token_ids": ids}, tokens, [0.0] * 60)
    assert np.abs(rollout.temperatures - want).max() < 1e-5

    with pytest.raises(RequestRefused, match=r"restart_strings\[0\]: no single token of this"):
        client.complete(
            "x", annealing={**schedule, "restart_strings": ["no such token at all"]}, max_tokens=3
        )


def test_a_resumed_segment_continues_its_clock_from_the_tokens_in_the_prompt(
    server: ServerProcess, reference: Reference
) -> None:
    """A partial rollout: prompt + the tokens so far, position_offset = their number."""
    raw = {
        **SEGMENT,
        "answer": {"schedule": "linear", "length": 25.0, "tau_max": 0.9, "tau_min": 0.5},
        "end_of_thinking_token_ids": [END],
    }
    prompt = [50, 51, 52]
    for earlier in ([7, 7, MARK, 7, 7], [7, END, 7], [7, 7]):
        body = {
            "input_ids": prompt + earlier,
            "sampling_params": {
                "max_new_tokens": 12,
                "ignore_eos": True,
                "annealing": {**raw, "position_offset": len(earlier)},
            },
        }
        answer = post(server, "/generate", body)
        tokens = earlier + answer["output_ids"]
        want = walk(raw, tokens, [0.0] * len(tokens))[len(earlier) :]
        assert answer["meta_info"]["temperatures"] == pytest.approx(want, abs=1e-5)


def test_a_resumed_branch_continues_from_the_threshold_that_its_entropies_had_led_to(
    client: Client,
) -> None:
    """Also where the answer is cut in the middle, by the route for partial rollouts."""
    raw = {"schedule": "branch", "threshold": 9.0, "rate": 0.5, "top": 0.5, "step": 0}
    kwargs: dict[str, Any] = {"entropies": True, "ignore_eos": True}
    answer = client.rollouts(["def "], annealing=raw, max_new_tokens=30, **kwargs)
    before = answer.groups[0].answers[0].rollout
    assert before is not None
    assert before.entropies is not None
    cut, threshold = 20, 9.0
    for h in before.entropies[:cut].tolist():
        threshold += 0.5 * ((h > threshold) - 0.5)
    assert threshold < 7.0  # 9.0 is above all entropies (ln 1024): it falls, and then follows them
    prompt = {"text": "def ", "prefix_token_ids": before.token_ids[:cut].tolist()}
    with pytest.raises(RequestRefused, match=r"annealing\.threshold: is required"):
        client.rollouts([prompt], annealing={"schedule": "branch"}, max_new_tokens=3)
    resumed = {**raw, "threshold": threshold}
    answer = client.rollouts([prompt], annealing=resumed, max_new_tokens=20, **kwargs)
    after = answer.groups[0].answers[0].rollout
    assert after is not None
    assert after.entropies is not None
    entropies = [*before.entropies[:cut], *after.entropies]
    want = walk(raw, [0] * len(entropies), [float(h) for h in entropies])
    assert after.temperatures.tolist() == pytest.approx(want[cut:], abs=1e-6)
    assert 1.2 in want[cut : cut + 20]  # which starting anew at 9.0 would not reach in 8 tokens


def test_rollout_false_anneals_without_arrays(server: ServerProcess, reference: Reference) -> None:
    """SGLang's own log-probabilities show that the temperatures were those of the schedule."""
    schedule = {"schedule": "two_stage", "switch": 6, "tau_max": 1.5, "tau_min": 0.4}
    params = {"max_new_tokens": 12, "ignore_eos": True, "annealing": schedule, "rollout": False}
    body = {"input_ids": [5, 6, 7], "sampling_params": params, "return_logprob": True}
    answer = post(server, "/generate", body)
    meta = answer["meta_info"]
    assert meta["annealing"]["schedule"] == "two_stage"
    assert not {"temperatures", "logprobs", "model_logprobs"} & set(meta)
    logits = reference.logits([5, 6, 7], answer["output_ids"])
    for t, (logprob, token, _) in enumerate(meta["output_token_logprobs"]):
        tau = 1.5 if t < 6 else 0.4
        assert logprob == pytest.approx(
            (logits[t] / tau).log_softmax(-1)[token].item(), abs=LOGPROB_TOLERANCE
        )
    chat = {"model": "tiny", "prompt": "x", "max_tokens": 3, "annealing": schedule}
    choice = post(server, "/v1/completions", {**chat, "rollout": False})["choices"][0]
    assert "rollout" not in choice
