"""Every kind of schedule on a running server, against the walk of `kinds`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from helpers.answers import UNLIKELY, surprise
from helpers.kinds import walk
from helpers.reference import Reference
from helpers.serving import LOGPROB_TOLERANCE

from ead_client import Client, Rollout
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
