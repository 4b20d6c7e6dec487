"""Streams of answers, and the reference's opinion of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
import torch

from ead_client import Rollout


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a streamed answer, without its end mark."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
    return [json.loads(line) for line in lines if line not in ("[DONE]",)]


UNLIKELY = 4.9  # standard deviations, of which a normal variable is off once in a million


def surprise(behaviour: Sequence[torch.Tensor], tokens: Sequence[Any]) -> float:
    """How far the tokens are from being drawn from the distributions said, in standard deviations.

    behaviour: log mu of every answer, [T, V] each; tokens: [T] each. The sum over all tokens of
    -log mu(y_t) - H(mu_t) has mean 0, since every term has, given the tokens before it, and its
    variance is the sum of theirs. One test for all tokens: |z| is above UNLIKELY once in a million.
    """
    total = variance = 0.0
    for log_mu, drawn in zip(behaviour, tokens, strict=True):
        mu = log_mu.exp()
        costs = torch.where(mu > 0, -log_mu, 0.0)
        entropy = (mu * costs).sum(-1)
        chosen = costs.gather(1, torch.as_tensor(drawn).unsqueeze(1)).squeeze(1)
        total += float((chosen - entropy).sum())
        variance += float(((mu * costs**2).sum(-1) - entropy**2).sum())
    return total / math.sqrt(variance)


@torch.no_grad()
def gaps(rollout: Rollout, model: Any) -> np.ndarray:
    """|server's log pi - this model's| of each token."""
    prompt = rollout.prompt_token_ids
    assert prompt is not None
    ids = torch.tensor([[*prompt, *rollout.token_ids]])
    logprobs = model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    want = logprobs.gather(1, torch.from_numpy(rollout.token_ids).unsqueeze(1)).squeeze(1)
    return np.asarray(np.abs(rollout.model_logprobs - want.numpy()))
