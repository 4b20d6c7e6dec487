"""Advantages against formulas written out here, against enumeration, and against verl's."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from helpers.trainers import functions
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from trainer_bridge.algorithms.advantages import (
    AdvantageConfig,
    advantages,
    groups_with_signal,
    overlong_penalty,
)

KINDS = ("grpo", "dr_grpo", "rloo", "reinforce++", "pass@k")
configs = st.builds(AdvantageConfig, kind=st.sampled_from(KINDS), k=st.integers(2, 5))
# quarters: sums and means of them are exact, so that equal rewards have equal advantages
quarters = st.integers(-8, 8).map(lambda number: number / 4)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Rewards (float64) and group ids of up to 12 answers, the groups ragged and interleaved."""
    rewards = draw(st.lists(quarters, min_size=1, max_size=12))
    groups = draw(st.lists(st.sampled_from([3, 7, 40]), min_size=len(rewards), max_size=12))
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups[: len(rewards)])


def naive(rewards: list[float], groups: list[int], config: AdvantageConfig) -> list[float]:
    """The docstrings' formulas, answer by answer; pass@k by listing the subsets."""
    members = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    means = {group: np.mean([rewards[j] for j in who]) for group, who in members.items()}
    centred = [reward - means[group] for reward, group in zip(rewards, groups, strict=True)]
    result = []
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        others = [rewards[j] for j in members[group] if j != i]
        mine = [rewards[j] for j in members[group]]
        if len(set(mine)) == 1:
            result.append(0.0)
        elif config.kind == "grpo":
            result.append(centred[i] / (np.std(mine, ddof=1) + config.epsilon))
        elif config.kind == "dr_grpo":
            result.append(centred[i])
        elif config.kind == "rloo":
            result.append(reward - np.mean(others))
        elif config.kind == "reinforce++":
            result.append(centred[i] / (np.std(centred, ddof=1) + config.epsilon))
        else:
            k = min(config.k, len(mine))
            subsets = list(itertools.combinations(members[group], k))
            gains = [
                max(rewards[j] for j in subset) - max(rewards[j] for j in subset if j != i)
                for subset in subsets
                if i in subset
            ]
            result.append(len(mine) * sum(gains) / len(subsets))
    return result


@given(batches(), configs)
def test_advantages_equal_their_formula(
    batch: tuple[Tensor, Tensor], config: AdvantageConfig
) -> None:
    rewards, groups = batch
    got = advantages(rewards, groups, config)
    assert got.dtype == rewards.dtype
    assert got.tolist() == pytest.approx(naive(rewards.tolist(), groups.tolist(), config), abs=1e-9)


@given(batches(), configs, quarters, st.randoms())
def test_advantages_ignore_a_shift_of_the_rewards_and_the_order_of_the_answers(
    batch: tuple[Tensor, Tensor], config: AdvantageConfig, shift: float, random: Any
) -> None:
    rewards, groups = batch
    want = advantages(rewards, groups, config)
    order = torch.tensor(random.sample(range(len(rewards)), len(rewards)))
    got = advantages((rewards + shift)[order], groups[order], config)
    assert torch.allclose(got, want[order], atol=1e-9)


@given(st.floats(-1e4, 1e4, width=32), st.lists(st.integers(0, 3), min_size=1, max_size=9), configs)
def test_a_group_without_variance_teaches_exactly_nothing(
    reward: float, groups: list[int], config: AdvantageConfig
) -> None:
    """Also where the mean of equal float32 rewards is not that reward."""
    rewards = torch.full((len(groups),), reward)
    assert advantages(rewards, torch.tensor(groups), config).tolist() == [0.0] * len(groups)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_one_and_an_empty_batch_are_no_trouble(kind: Any) -> None:
    config = AdvantageConfig(kind=kind)
    got = advantages(torch.tensor([5.0, 1.0, 0.0]), torch.tensor([2, 1, 1]), config)
    assert got[0] == 0
    assert got[1] > 0
    assert torch.isfinite(got).all()
    nobody = torch.zeros(0, dtype=torch.int64)
    assert advantages(torch.zeros(0), nobody, config).shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        advantages(torch.tensor([1.0, bad]), torch.tensor([0, 0]), AdvantageConfig())


@given(batches())
def test_groups_have_signal_where_their_rewards_differ(batch: tuple[Tensor, Tensor]) -> None:
    rewards, groups = batch
    for flag, group in zip(groups_with_signal(rewards, groups).tolist(), groups, strict=True):
        assert flag == (len(set(rewards[groups == group].tolist())) > 1)


# Enumeration: a policy over three answers, all 3^n groups of n of them with their probabilities.


def expected_gradient(rewards: Tensor, n: int, config: AdvantageConfig) -> tuple[Tensor, Tensor]:
    """E[mean over the group of A grad log pi], and the logits it is the gradient for."""
    logits = torch.tensor([0.3, -0.4, 0.9], dtype=torch.float64, requires_grad=True)
    log_pi = logits.log_softmax(0)
    groups = torch.tensor(list(itertools.product(range(3), repeat=n)))
    surrogate = torch.zeros((), dtype=torch.float64)
    for answers in groups:
        advantage = advantages(rewards[answers], torch.zeros(n, dtype=torch.int64), config)
        probability = log_pi[answers].sum().exp().detach()
        surrogate = surrogate + probability * (advantage * log_pi[answers]).mean()
    (gradient,) = torch.autograd.grad(surrogate, logits)
    return gradient, logits


REWARDS = torch.tensor([0.0, 0.7, 1.0], dtype=torch.float64)


def best_of(k: int, logits: Tensor) -> Tensor:
    """E[best reward of k answers], from the distribution function of one."""
    below = torch.cat([torch.zeros(1, dtype=torch.float64), logits.softmax(0).cumsum(0)])
    return (REWARDS * (below[1:] ** k - below[:-1] ** k)).sum()


@pytest.mark.parametrize(("n", "k"), [(2, 2), (3, 2), (4, 2), (4, 3), (4, 4)])
def test_pass_at_k_is_unbiased_for_the_best_of_k(n: int, k: int) -> None:
    got, logits = expected_gradient(REWARDS, n, AdvantageConfig(kind="pass@k", k=k))
    (want,) = torch.autograd.grad(best_of(k, logits), logits)
    assert torch.allclose(got, want, atol=1e-14)


@pytest.mark.parametrize(("kind", "factor"), [("rloo", 1.0), ("dr_grpo", 2 / 3)])
def test_rloo_is_unbiased_and_dr_grpo_is_short_by_its_own_share(kind: Any, factor: float) -> None:
    got, logits = expected_gradient(REWARDS, 3, AdvantageConfig(kind=kind))
    (want,) = torch.autograd.grad(best_of(1, logits), logits)
    assert torch.allclose(got, factor * want, atol=1e-14)


def test_a_division_by_the_groups_own_std_is_biased() -> None:
    """As the module says: no multiple of the gradient of the expected reward."""
    got, logits = expected_gradient(REWARDS, 3, AdvantageConfig(kind="grpo"))
    (want,) = torch.autograd.grad(best_of(1, logits), logits)
    assert torch.nn.functional.cosine_similarity(got, want, dim=0) < 0.999


# verl, on the same rewards: its [answers, tokens] with one token each.

VERL = {
    "grpo": "compute_grpo_outcome_advantage",
    "dr_grpo": "compute_grpo_outcome_advantage",
    "rloo": "compute_rloo_outcome_advantage",
    "reinforce++": "compute_reinforce_plus_plus_baseline_outcome_advantage",
    "pass@k": "compute_grpo_passk_outcome_advantage",
}


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_equal_verls(kind: Any) -> None:
    """Groups of four; pass@k, which verl has for k = n alone, without its division by n."""
    torch_functional = functions(
        "verl",
        "verl/utils/torch_functional.py",
        "masked_sum",
        "masked_mean",
        "masked_var",
        "masked_whiten",
    )
    theirs = functions(
        "verl",
        "verl/trainer/ppo/core_algos.py",
        VERL[kind],
        defaultdict=defaultdict,
        verl_F=torch_functional,
    )
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    groups = torch.arange(12) % 3
    options: dict[str, Any] = {}
    if kind in ("grpo", "dr_grpo"):
        options["norm_adv_by_std_in_grpo"] = kind == "grpo"
    if kind == "pass@k":
        options["config"] = {"norm_adv_by_std_in_grpo": False}
    want, _ = getattr(theirs, VERL[kind])(
        rewards.view(-1, 1).clone(), torch.ones(12, 1), groups.numpy(), **options
    )
    got = advantages(rewards, groups, AdvantageConfig(kind=kind, k=4))
    scale = 4 if kind == "pass@k" else 1
    assert torch.allclose(got, scale * want.squeeze(1).double(), atol=1e-6)


# DAPO's overlong shaping


def test_overlong_answers_lose_linearly_within_the_buffer() -> None:
    lengths = torch.tensor([1, 6, 7, 8, 10, 14])
    got = overlong_penalty(lengths, max_tokens=10, buffer=4, factor=0.5)
    assert got.tolist() == [0, 0, -0.125, -0.25, -0.5, -0.5]


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 100), st.floats(0, 2))
def test_the_overlong_penalty_equals_verls_up_to_the_longest_answer(
    length: int, max_tokens: int, buffer: int, factor: float
) -> None:
    """verl's (dapo.py) has no floor, since no answer there is longer than max_tokens."""
    assume(buffer <= max_tokens and length <= max_tokens)
    verl = min(-(length - (max_tokens - buffer)) / buffer * factor, 0)
    got = overlong_penalty(torch.tensor([length]), max_tokens, buffer, factor)
    assert got.item() == pytest.approx(verl, abs=1e-6)


@pytest.mark.parametrize("buffer", [0, -1, 11])
def test_a_buffer_beyond_the_answer_is_refused(buffer: int) -> None:
    with pytest.raises(ValueError, match="buffer"):
        overlong_penalty(torch.tensor([1]), 10, buffer)
