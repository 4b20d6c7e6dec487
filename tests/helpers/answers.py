"""Streams of answers, and the reference's opinion of them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import torch

from ead_client import Rollout


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a streamed answer, without its end mark."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
    return [json.loads(line) for line in lines if line not in ("[DONE]",)]


@torch.no_grad()
def gaps(rollout: Rollout, model: Any) -> np.ndarray:
    """|server's log pi - this model's| of each token."""
    prompt = rollout.prompt_token_ids
    assert prompt is not None
    ids = torch.tensor([[*prompt, *rollout.token_ids]])
    logprobs = model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    want = logprobs.gather(1, torch.from_numpy(rollout.token_ids).unsqueeze(1)).squeeze(1)
    return np.asarray(np.abs(rollout.model_logprobs - want.numpy()))
