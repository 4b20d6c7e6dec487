"""One answer as a trainer gets it."""

from __future__ import annotations

from typing import Any

from ead_client import Rollout


def rollout(prompt: list[int], tokens: list[int], **columns: Any) -> Rollout:
    ones = [1.0] * len(tokens)
    names = ("temperatures", "logprobs", "model_logprobs")
    return Rollout(
        token_ids=tokens,
        prompt_token_ids=prompt,
        **{name: columns.get(name, ones) for name in names},
    )
