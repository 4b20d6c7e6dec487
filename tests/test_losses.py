"""The loss and its parts against float64 computations written out here, and against enumeration."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer_bridge import GrpoLoss, group_advantages, grpo_loss
from trainer_bridge.losses import effective_sample_size

log_probabilities = st.floats(-8.0, -0.01)


@st.composite
def batches(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tokens of up to four answers, packed, as float64."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    count = sum(lengths)

    def column(values: st.SearchStrategy[float]) -> torch.Tensor:
        drawn = draw(st.lists(values, min_size=count, max_size=count))
        return torch.tensor(drawn, dtype=torch.float64)

    old = column(log_probabilities)
    # hundredths: products with advantages near the smallest float vanish, on both sides of a clip
    hundredths = st.integers(-200, 200).map(lambda number: number / 100)
    advantages = draw(st.lists(hundredths, min_size=len(lengths), max_size=len(lengths)))
    return {
        "logprobs": (old + column(st.floats(-0.5, 0.5))).requires_grad_(),
        "old_logprobs": old,
        "behaviour_logprobs": column(log_probabilities),
        "advantages": torch.tensor(np.repeat(advantages, lengths)),
        "sequence_ids": torch.tensor(np.repeat(range(len(lengths)), lengths)),
    }


configs = st.builds(
    GrpoLoss,
    clip_low=st.floats(0.05, 0.4),
    clip_high=st.floats(0.05, 0.4),
    correction=st.sampled_from(["tis", "none"]),
    correction_cap=st.floats(0.5, 5.0),
    aggregation=st.sampled_from(["token-mean", "seq-mean-token-mean"]),
)


def naive_loss(batch: dict[str, torch.Tensor], config: GrpoLoss) -> float:
    """The docstring's formula, token by token."""
    columns = {name: tensor.detach().tolist() for name, tensor in batch.items()}
    per_answer: dict[int, list[float]] = {}
    for pi, old, mu, advantage, answer in zip(*columns.values(), strict=True):
        ratio = math.exp(pi - old)
        clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
        weight = min(math.exp(old - mu), config.correction_cap)
        if config.correction == "none":
            weight = 1.0
        token = -weight * min(ratio * advantage, clipped * advantage)
        per_answer.setdefault(answer, []).append(token)
    if config.aggregation == "token-mean":
        return float(np.mean([token for tokens in per_answer.values() for token in tokens]))
    return float(np.mean([np.mean(tokens) for tokens in per_answer.values()]))


@given(batches(), configs)
def test_the_loss_equals_its_formula(batch: dict[str, Any], config: GrpoLoss) -> None:
    loss, metrics = grpo_loss(**batch, config=config)
    assert loss.item() == pytest.approx(naive_loss(batch, config), abs=1e-12)
    assert metrics.loss == loss.item()


@given(batches(), configs)
def test_the_gradient_flows_through_the_policy_alone(
    batch: dict[str, Any], config: GrpoLoss
) -> None:
    """d loss / d log pi_t = -w_t r_t A_t / count where the ratio is inside its clip, else 0."""
    loss, metrics = grpo_loss(**batch, config=config)
    loss.backward()
    logprobs, old = batch["logprobs"].detach(), batch["old_logprobs"]
    ratio, advantages = (logprobs - old).exp(), batch["advantages"]
    weights = (old - batch["behaviour_logprobs"]).exp().clamp(max=config.correction_cap)
    if config.correction == "none":
        weights = torch.ones_like(weights)
    lengths = torch.bincount(batch["sequence_ids"])
    count = (lengths * len(lengths))[batch["sequence_ids"]]
    if config.aggregation == "token-mean":
        count = torch.full_like(count, len(ratio))
    blocked = (advantages > 0) & (ratio > 1 + config.clip_high)
    blocked |= (advantages < 0) & (ratio < 1 - config.clip_low)
    want = torch.where(blocked, 0.0, -weights * ratio * advantages / count)
    assert torch.allclose(batch["logprobs"].grad, want, atol=1e-12)
    assert metrics.clip_fraction == pytest.approx(blocked.double().mean().item())


def test_metrics_of_known_weights() -> None:
    old = torch.log(torch.tensor([0.5, 0.5, 0.5, 0.5]))
    behaviour = torch.log(torch.tensor([0.5, 0.25, 0.1, 1.0]))  # raw weights 1, 2, 5, 0.5
    _, metrics = grpo_loss(
        old, old, behaviour, torch.ones(4), torch.zeros(4, dtype=torch.int64), GrpoLoss()
    )
    assert metrics.weight_mean == pytest.approx((1 + 2 + 2 + 0.5) / 4)
    assert metrics.weight_max == pytest.approx(2.0)
    assert metrics.weight_capped == pytest.approx(0.25)  # 2 is at the cap, not above it
    assert metrics.effective_sample_size == pytest.approx(5.5**2 / (4 * (1 + 4 + 4 + 0.25)))


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
def test_effective_sample_size_is_a_share(weights: list[float]) -> None:
    size = effective_sample_size(torch.tensor(weights, dtype=torch.float64))
    assert 1 / len(weights) - 1e-9 <= size <= 1 + 1e-9


@given(st.lists(st.lists(st.floats(-3.0, 3.0), min_size=4, max_size=4), min_size=1, max_size=5))
def test_advantages_are_standardised_within_each_group(rewards: list[list[float]]) -> None:
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64)).numpy()
    for row, group in zip(got, rewards, strict=True):
        want = (np.array(group) - np.mean(group)) / (np.std(group) + 1e-6)
        assert np.isfinite(row).all()
        assert row == pytest.approx(want, abs=1e-6)


def test_a_group_without_variance_teaches_nothing() -> None:
    assert group_advantages(torch.full((2, 3), 0.7)).tolist() == [[0.0] * 3] * 2


def test_the_corrected_gradient_is_the_on_policy_one_when_nothing_is_capped() -> None:
    """Enumeration of all answers of three tokens from a vocabulary of three.

    pi is a softmax of free logits per position, and mu its annealed version. Token-level weights
    are exact where tokens are independent: the expectation under mu of the corrected gradient
    then equals the gradient of the expected reward under pi, when the reward is a sum over
    tokens and each token's advantage is its own part of it.
    """
    torch.manual_seed(0)
    logits = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    part = torch.randn(3, 3, dtype=torch.float64)  # reward of token v at position t
    tau = torch.tensor([[1.0], [0.7], [0.3]], dtype=torch.float64)
    log_pi, log_mu = logits.log_softmax(-1), (logits / tau).log_softmax(-1).detach()

    exact = (log_pi.exp() * part).sum()
    (want,) = torch.autograd.grad(exact, logits, retain_graph=True)

    position = torch.arange(3)
    uncapped = GrpoLoss(correction_cap=1e9)

    def expected_gradient(config: GrpoLoss) -> torch.Tensor:
        total = torch.zeros_like(logits)
        for answer in itertools.product(range(3), repeat=3):
            tokens = torch.tensor(answer)
            pi, mu = log_pi[position, tokens], log_mu[position, tokens]
            loss, _ = grpo_loss(
                pi,
                pi.detach(),
                mu,
                part[position, tokens],
                torch.zeros(3, dtype=torch.int64),
                config,
            )
            (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
            total += mu.sum().exp() * gradient
        return -3 * total  # the loss is a mean over three tokens, to be minimised

    assert torch.allclose(expected_gradient(uncapped), want, atol=1e-12)
    assert not torch.allclose(expected_gradient(GrpoLoss(correction="none")), want, atol=1e-2)
