"""Advantages and the GRPO loss, as pure functions of tensors.

Legend: P = prompts, G = answers per prompt (a group), N = generated tokens of a whole batch,
packed without padding. mu = behaviour policy (the schedule's temperatures), pi_old = the policy
at the rollout's weights at temperature 1, pi = the policy now at temperature 1. What is trained is
pi at temperature 1; mu != pi_old is corrected by truncated importance sampling, as in EAD
(arXiv 2510.05251).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    """GRPO (arXiv 2402.03300): A = (r - mean) / (std + epsilon) within each group.

    rewards: float [P, G] -> float [P, G]. Exactly 0 in a group whose rewards are all equal.
    std is over the group itself (divided by G).
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    spread = centred.square().mean(dim=1, keepdim=True).sqrt()
    return torch.where(spread > 0, centred / (spread + epsilon), torch.zeros_like(centred))


@dataclass(frozen=True)
class GrpoLoss:
    """Settings of `grpo_loss`."""

    clip_low: float = 0.2
    clip_high: float = 0.28  # DAPO's clip-higher
    correction: Literal["tis", "none"] = "tis"
    correction_cap: float = 2.0  # C, largest weight of a token
    aggregation: Literal["token-mean", "seq-mean-token-mean"] = "token-mean"


@dataclass(frozen=True)
class LossMetrics:
    """Statistics of one update, over all its N tokens."""

    loss: float
    weight_mean: float  # of w = min(pi_old / mu, C)
    weight_max: float
    weight_capped: float  # share of tokens with pi_old / mu > C
    effective_sample_size: float  # (sum w)^2 / (N sum w^2), in (0, 1]
    clip_fraction: float  # share of tokens whose ratio was clipped, so that they have no gradient


def importance_weights(
    old_logprobs: Tensor, behaviour_logprobs: Tensor, config: GrpoLoss
) -> Tensor:
    """w_t = min(pi_old(y_t) / mu(y_t), C), or 1: float [N], without gradient."""
    if config.correction == "none":
        return torch.ones_like(old_logprobs)
    log_weights = (old_logprobs - behaviour_logprobs).detach()
    # exp of a clamped difference, so that no intermediate value overflows
    return log_weights.clamp(max=20.0).exp().clamp(max=config.correction_cap)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    sequence_ids: Tensor,
    config: GrpoLoss,
) -> tuple[Tensor, LossMetrics]:
    """Clipped surrogate of each token, weighted by w_t, aggregated:

        -w_t * min(r_t A, clip(r_t, 1 - low, 1 + high) A),    r_t = pi(y_t) / pi_old(y_t)

    logprobs: float [N], log pi, with gradient. old_logprobs, behaviour_logprobs: float [N], log
    pi_old and log mu. advantages: float [N], the answer's for each of its tokens. sequence_ids:
    int [N], which answer a token belongs to (used by seq-mean-token-mean).
    Returns the scalar loss and its statistics.
    """
    ratio = (logprobs - old_logprobs.detach()).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    weights = importance_weights(old_logprobs, behaviour_logprobs, config)
    per_token = -weights * surrogate
    loss = aggregate(per_token, sequence_ids, config.aggregation)
    with torch.no_grad():
        raw = importance_weights(
            old_logprobs, behaviour_logprobs, GrpoLoss(correction_cap=float("inf"))
        )
        metrics = LossMetrics(
            loss=loss.item(),
            weight_mean=weights.mean().item(),
            weight_max=weights.max().item(),
            weight_capped=(raw > config.correction_cap).float().mean().item(),
            effective_sample_size=effective_sample_size(weights),
            clip_fraction=(clipped * advantages < ratio * advantages).float().mean().item(),
        )
    return loss, metrics


def aggregate(
    per_token: Tensor,
    sequence_ids: Tensor,
    how: Literal["token-mean", "seq-mean-token-mean"],
) -> Tensor:
    """Mean over all tokens (DAPO), or over answers of the mean over their tokens (GRPO)."""
    if how == "token-mean":
        return per_token.mean()
    _, positions = sequence_ids.unique(return_inverse=True)
    lengths = torch.bincount(positions).to(per_token.dtype)
    return (per_token / lengths[positions]).sum() / len(lengths)


def effective_sample_size(weights: Tensor) -> float:
    """(sum w)^2 / (N sum w^2): 1 when all weights are equal, 1/N when one carries everything."""
    return (weights.sum() ** 2 / (len(weights) * weights.square().sum())).item()
