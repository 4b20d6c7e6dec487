"""Answers to make an update of."""

from __future__ import annotations

import torch
from helpers.samples import rollout

from trainer_bridge.policy.batch import Sample
from trainer_bridge.policy.policy import Policy
from trainer_bridge.policy.trainer import (
    ScoredAnswers,
)

GROUPS, SIZE = 3, 4


def answers(policy: Policy, seed: int = 0) -> ScoredAnswers:
    """Random answers to three prompts, with numbers as a server of the same weights says them."""
    generator = torch.Generator().manual_seed(seed)

    def integers(count: int, low: int = 3, high: int = 900) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    samples, rewards, group_ids = [], [], []
    for group in range(GROUPS):
        prompt = integers(5)
        for _ in range(SIZE):
            tokens = integers(integers(1, 1, 9)[0])
            taus = torch.rand(len(tokens), generator=generator) + 0.5
            with torch.no_grad():
                logits = policy.model(torch.tensor([prompt + tokens]).to(policy.device)).logits
            rows = logits[0, 4:-1].float().cpu()
            chosen = torch.tensor(tokens)[:, None]
            log_mu = (rows / taus[:, None]).log_softmax(-1).gather(1, chosen).squeeze(1)
            log_pi = rows.log_softmax(-1).gather(1, chosen).squeeze(1)
            turn = rollout(
                prompt,
                tokens,
                temperatures=taus.tolist(),
                logprobs=log_mu.tolist(),
                model_logprobs=log_pi.tolist(),
            )
            samples.append(Sample.of(turn))
            rewards.append(float(integers(1, 0, 5)[0]))
            group_ids.append(group)
    return ScoredAnswers(samples, rewards, group_ids)
