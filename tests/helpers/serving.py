"""Answers of a server, against a forward pass of the same weights."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import torch
from helpers.closed_form import closed_form
from helpers.reference import Reference

from ead_client import Rollout
from ead_sampler import parse_annealing
from ead_server.launch.process import ServerProcess

LOGPROB_TOLERANCE = 1e-4

FAST = {"tau_max": 1.5, "tau_min": 0.3, "decay": 20.0, "warmup": 3, "step": 0}


def expected_temperatures(schedule: dict[str, Any], count: int) -> list[float]:
    parsed = parse_annealing(schedule)
    return [closed_form(t + parsed.position_offset, parsed) for t in range(count)]


def check_against_reference(rollout: Rollout, reference: Reference) -> None:
    """Every number of an untruncated rollout from one Hugging Face forward pass."""
    logits = reference.logits(rollout.prompt_token_ids, rollout.token_ids)
    tau = torch.from_numpy(rollout.temperatures).double().unsqueeze(1)
    chosen = torch.from_numpy(rollout.token_ids).unsqueeze(1)
    model = logits.log_softmax(-1)
    behaviour = (logits / tau).log_softmax(-1)
    for got, want in (
        (rollout.model_logprobs, model.gather(1, chosen)),
        (rollout.logprobs, behaviour.gather(1, chosen)),
    ):
        assert np.abs(got - want.squeeze(1).numpy()).max() < LOGPROB_TOLERANCE
    if rollout.entropies is not None:
        entropies = -(model.exp() * model).sum(-1).numpy()
        assert np.abs(rollout.entropies - entropies).max() < LOGPROB_TOLERANCE


def post(server: ServerProcess, route: str, body: dict[str, Any]) -> Any:
    response = httpx.post(server.url + route, json=body, headers=server.admin_headers, timeout=300)
    assert response.status_code == 200, response.text
    return response.json()
