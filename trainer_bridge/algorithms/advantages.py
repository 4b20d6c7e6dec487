"""How much better an answer was than the others to its prompt.

Legend: A = answers of a batch, flat; P = prompts; n = answers of one prompt (a group). Groups may
differ in size, since failed answers are dropped, and their answers need not be neighbours. A group
whose rewards are all equal, or of one answer, teaches nothing: its advantages are exactly 0,
whatever the kind, never NaN.

r = reward of an answer; mean, std (divided by n - 1) and sums are over its group.
| kind | advantage of an answer | arXiv |
| --- | --- | --- |
| grpo | (r - mean) / (std + epsilon) | 2402.03300 |
| dr_grpo | r - mean | 2503.20783 |
| rloo | r - mean of the others = n / (n - 1) (r - mean) | 2402.14740 |
| reinforce++ | (r - mean) / (std of r - mean in the batch + epsilon): with baseline | 2501.03262 |
| pass@k | see `_pass_at_k` | 2505.15201 |

With g the gradient of an answer's log-probability, the mean of A g over the answers of a group is
an unbiased estimate of the gradient of the expected reward for rloo, of the expected best of k
for pass@k, and of (n - 1) / n of the former for dr_grpo, whose mean includes the answer itself.
Dividing by a std that depends on the answers (grpo, reinforce++) gives up unbiasedness.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer_bridge.settings import Settings


class AdvantageConfig(Settings):
    """Settings of `advantages`."""

    kind: Literal["grpo", "dr_grpo", "rloo", "reinforce++", "pass@k"] = "grpo"
    k: int = Field(4, ge=2, description="pass@k: answers of which the best counts (1 is rloo)")
    epsilon: float = Field(
        1e-6, ge=0, description="grpo, reinforce++: added to the std (verl 1e-6, TRL 1e-4)"
    )


def advantages(rewards: Tensor, group_ids: Tensor, config: AdvantageConfig) -> Tensor:
    """The table above. rewards: float [A]; group_ids: int [A], the prompt's -> float [A].

    Raises ValueError for a reward that is not finite: it would spoil its whole group.
    """
    if not torch.isfinite(rewards).all():
        raise ValueError("a reward is not finite")
    _, groups, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    zeros, sizes = rewards.new_zeros(len(sizes)), sizes.to(rewards.dtype)
    centred = rewards - (zeros.index_add(0, groups, rewards) / sizes)[groups]
    match config.kind:
        case "grpo":
            variance = zeros.index_add(0, groups, centred.square()) / (sizes - 1).clamp(min=1)
            result = centred / (variance.sqrt()[groups] + config.epsilon)
        case "dr_grpo":
            result = centred
        case "rloo":
            result = centred * (sizes / (sizes - 1).clamp(min=1))[groups]
        case "reinforce++":
            spread = (centred.square().sum() / max(len(centred) - 1, 1)).sqrt()
            result = centred / (spread + config.epsilon)
        case "pass@k":
            result = torch.zeros_like(rewards)
            for group in range(len(sizes)):
                members = groups == group
                result[members] = _pass_at_k(rewards[members], config.k)
    # what rounding leaves of a difference of equal rewards would be blown up by a division
    return torch.where(groups_with_signal(rewards, group_ids), result, torch.zeros_like(result))


def groups_with_signal(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Whether the rewards in an answer's group differ: float [A], int [A] -> bool [A].

    DAPO's dynamic sampling (arXiv 2503.14476) replaces the groups where they do not. With pass@k
    a group may differ and yet teach nothing (its two best answers are equal, and k is its size).
    """
    _, groups, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    zeros = rewards.new_zeros(len(sizes))
    highest = zeros.scatter_reduce(0, groups, rewards, "amax", include_self=False)
    lowest = zeros.scatter_reduce(0, groups, rewards, "amin", include_self=False)
    return (highest > lowest)[groups]


def overlong_penalty(lengths: Tensor, max_tokens: int, buffer: int, factor: float = 1.0) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476), to be added to the rewards.

    0 up to max_tokens - buffer tokens, then falling linearly to -factor at max_tokens, and -factor
    beyond. lengths: int [A], tokens of each answer -> float32 [A]. Raises ValueError unless
    0 < buffer <= max_tokens.
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"buffer must be in (0, {max_tokens}], not {buffer}")
    excess = (lengths - (max_tokens - buffer)).float() / buffer
    return -factor * excess.clamp(0.0, 1.0)


def _pass_at_k(rewards: Tensor, k: int) -> Tensor:
    """One group's advantages for the objective E[best reward of k answers]: float [n] -> [n].

    PKPO (arXiv 2505.15201), its estimator s^(loo-1) (eq. 33), times n: the mean over all subsets
    of k answers of what an answer adds to the best of the others in it,

        A_i = n / C(n, k) * sum over subsets I of size k with i in I of (max_I r - max_{I - i} r)

    In closed form, with the rewards in ascending order and j counted from 1:

        A_i = n / C(n, k) * sum over j < i of C(j - 1, k - 2) (r_i - r_j)

    Unbiased for any k <= n, since the best of the others does not depend on answer i; for k = n
    it is n times the leave-one-out advantage of arXiv 2503.19595, which verl calls grpo_passk. A
    group of fewer than k answers is taken for the best of all of its own.
    """
    n = len(rewards)
    k = min(k, n)
    if k < 2:
        return torch.zeros_like(rewards)
    ascending, order = rewards.sort()
    subsets = math.comb(n, k)
    weights = rewards.new_tensor([n * math.comb(j, k - 2) / subsets for j in range(n)])
    gains = ascending.view(-1, 1) - ascending  # [i, j]
    result = torch.empty_like(rewards)
    result[order] = (gains * weights).tril().sum(dim=1)
    return result
