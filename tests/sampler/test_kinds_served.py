"""Every kind of schedule on a real server, all in one running batch, also while it is unsettled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.kinds import walk
from helpers.kinds_served import END, MARK, SCHEDULES, SEGMENT, check_all_kinds
from helpers.reference import Reference
from helpers.serving import LOGPROB_TOLERANCE, post

from ead_client import Client, RequestRefused
from ead_sampler import REGISTRY
from ead_server.launch.process import ServerProcess


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
