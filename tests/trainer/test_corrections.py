"""What each correction is unbiased for, by enumerating every answer of a small policy in float64.

The policy has its own logits after every prefix, three tokens, token 0 ends an answer, and three
tokens do. mu is the policy annealed from hot to cool. Expectations under mu are sums over all 15
answers, given to our functions as one packed batch; what theory says is computed apart from them,
by recursion over prefixes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.trainers import branch, functions, padded
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from trainer_bridge.algorithms.corrections import (
    CorrectionConfig,
    correction_metrics,
    correction_weights,
)
from trainer_bridge.algorithms.loss_config import ClipLossConfig
from trainer_bridge.algorithms.losses import policy_loss

Prefix = tuple[int, ...]
TAUS = (1.3, 0.7, 0.4)


def grow(prefix: Prefix = ()) -> Iterator[Prefix]:
    """All answers that begin with a prefix."""
    if len(prefix) == 3 or prefix[-1:] == (0,):
        yield prefix
    else:
        for token in range(3):
            yield from grow((*prefix, token))


ANSWERS = list(grow())
PREFIXES = sorted({answer[:t] for answer in ANSWERS for t in range(len(answer))})
ROWS = torch.tensor([PREFIXES.index(a[:t]) for a in ANSWERS for t in range(len(a))])
TOKENS = torch.tensor([token for answer in ANSWERS for token in answer])
IDS = torch.tensor([i for i, answer in enumerate(ANSWERS) for _ in answer])


class World:
    """A policy's logits [prefixes, 3] and the return of every answer [15]."""

    def __init__(self, taus: tuple[float, ...] = TAUS, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (len(PREFIXES), 3)
        self.logits = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        self.returns = torch.rand(len(ANSWERS), generator=generator, dtype=torch.float64)
        self.taus = torch.tensor([taus[len(prefix)] for prefix in PREFIXES]).double().view(-1, 1)

    def log_pi(self, tempered: bool = False) -> Tensor:
        """log-probabilities [prefixes, 3], with gradient."""
        return (self.logits / self.taus if tempered else self.logits).log_softmax(dim=1)

    def packed(self, tempered: bool = False) -> Tensor:
        """Those of the answers' tokens: [N]."""
        return self.log_pi(tempered)[ROWS, TOKENS]

    def answers(self, tempered: bool = False) -> Tensor:
        """Probability of every answer: [15]."""
        packed = self.packed(tempered)
        return packed.new_zeros(len(ANSWERS)).index_add(0, IDS, packed).exp()

    def gradient(self, objective: Tensor) -> Tensor:
        (result,) = torch.autograd.grad(objective, self.logits)
        return result

    # what our functions do

    def corrected(self, tempered: bool = False, **settings: Any) -> Tensor:
        """The sum over an answer's tokens of their corrected losses, negated: [15]."""
        config = CorrectionConfig(**settings)
        log_pi, log_mu = self.packed(tempered), self.packed(tempered=True).detach()
        weights = correction_weights(log_pi.detach(), log_mu, IDS, config)
        loss, clipped = policy_loss(
            log_pi, log_pi.detach(), self.returns[IDS], IDS, ClipLossConfig()
        )
        assert not clipped.any()
        return -log_pi.new_zeros(len(ANSWERS)).index_add(0, IDS, weights * loss)

    def expected(self, tempered: bool = False, **settings: Any) -> Tensor:
        """E_mu of the gradient of the corrected objective."""
        mu = self.answers(tempered=True).detach()
        return self.gradient((mu * self.corrected(tempered, **settings)).sum())

    def each(self, **settings: Any) -> Tensor:
        """The gradient that each answer alone gives: [15, prefixes, 3]."""
        objectives = self.corrected(**settings)
        return torch.stack(
            [torch.autograd.grad(o, self.logits, retain_graph=True)[0] for o in objectives]
        )

    # what theory says

    def on_policy(self, tempered: bool = False) -> Tensor:
        """The gradient of E[R] under the policy, or under the tempered policy."""
        return self.gradient((self.answers(tempered) * self.returns).sum())

    def returns_of_mu(self, prefix: Prefix, power: int = 1) -> float:
        """Mean of R^power when mu finishes the answer."""
        if prefix in ANSWERS:
            return self.returns[ANSWERS.index(prefix)].item() ** power
        mu = self.log_pi(tempered=True)[PREFIXES.index(prefix)].exp()
        return sum(mu[v].item() * self.returns_of_mu((*prefix, v), power) for v in range(3))

    def reach(self, prefix: Prefix) -> float:
        """Probability that mu begins its answer so."""
        log_mu = self.log_pi(tempered=True)
        steps = [log_mu[PREFIXES.index(prefix[:t]), prefix[t]] for t in range(len(prefix))]
        return math.exp(sum(step.item() for step in steps))

    def theory(self, weight: Callable[[float, float], float]) -> tuple[Tensor, float]:
        """E_mu[g] and E_mu[|g|^2] of g = R sum_t w_t grad log pi_t, w_t = weight(pi_t, mu_t).

        Every prefix has its own logits, so the terms of an answer are orthogonal.
        """
        pi, mu = self.log_pi().exp().detach(), self.log_pi(tempered=True).exp().detach()
        mean, square = torch.zeros_like(pi), 0.0
        for row, prefix in enumerate(PREFIXES):
            for v in range(3):
                score = torch.eye(3, dtype=torch.float64)[v] - pi[row]
                w = weight(pi[row, v].item(), mu[row, v].item())
                probability = self.reach(prefix) * mu[row, v].item()
                after = (*prefix, v)
                mean[row] += probability * w * self.returns_of_mu(after) * score
                second = probability * w**2 * self.returns_of_mu(after, power=2)
                square += second * score.square().sum().item()
        return mean, square


@pytest.fixture
def world() -> World:
    return World()


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to b."""
    return ((a - b).norm() / b.norm()).item()


EXACT = 1e-13


def test_uncapped_sequence_weights_give_the_on_policy_gradient(world: World) -> None:
    assert distance(world.expected(kind="sequence", cap=0), world.on_policy()) < EXACT


def test_uncapped_sequence_weights_make_any_loss_that_of_pi_old(world: World) -> None:
    """Also where pi has left pi_old and is clipped: value and gradient."""
    old = world.packed().detach()
    with torch.no_grad():
        pi_old = world.answers()
        mu, log_mu = world.answers(tempered=True), world.packed(tempered=True)
        world.logits += 0.5 * World(seed=1).logits
    loss, clipped = policy_loss(
        world.packed(), old, world.returns[IDS] - 0.5, IDS, ClipLossConfig()
    )
    assert clipped.any()
    weights = correction_weights(old, log_mu, IDS, CorrectionConfig(kind="sequence", cap=0))
    got, want = (mu[IDS] * weights * loss).sum(), (pi_old[IDS] * loss).sum()
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    (got_gradient,) = torch.autograd.grad(got, world.logits, retain_graph=True)
    assert distance(got_gradient, world.gradient(want)) < EXACT


TOKEN_LEVEL: list[tuple[dict[str, Any], Callable[[float, float], float]]] = [
    ({"kind": "none"}, lambda pi, mu: 1.0),
    ({"kind": "tis", "cap": 0}, lambda pi, mu: pi / mu),
    ({"kind": "tis", "cap": 1.2}, lambda pi, mu: min(pi / mu, 1.2)),
    ({"kind": "mis", "cap": 1.2}, lambda pi, mu: pi / mu if pi / mu <= 1.2 else 0.0),
    (
        {"kind": "icepop", "low": 0.8, "high": 1.5},
        lambda pi, mu: pi / mu if 0.8 <= pi / mu <= 1.5 else 0.0,
    ),
]


@pytest.mark.parametrize(("settings", "weight"), TOKEN_LEVEL)
def test_token_weights_have_the_mean_and_variance_of_theory(
    world: World, settings: dict[str, Any], weight: Callable[[float, float], float]
) -> None:
    """pi's choice of one token, weighted, with prefix and continuation from mu."""
    mean, square = world.theory(weight)
    assert distance(world.expected(**settings), mean) < EXACT
    gradients, mu = world.each(**settings), world.answers(tempered=True).detach()
    got = (mu * gradients.square().sum(dim=(1, 2))).sum().item()
    assert got == pytest.approx(square, rel=1e-12)


@pytest.mark.parametrize(("settings", "weight"), TOKEN_LEVEL)
def test_what_mu_cannot_choose_is_left_out_and_the_rest_as_theory_says(
    settings: dict[str, Any], weight: Callable[[float, float], float]
) -> None:
    """One token of five, sampled at temperature 1.3 from the likeliest three, as top_k does."""
    logits = torch.tensor([1.0, 0.5, 0.1, -0.3, -2.0], dtype=torch.float64, requires_grad=True)
    log_pi = logits.log_softmax(0)
    kept = torch.arange(3)
    log_mu = (logits.detach()[kept] / 1.3).log_softmax(0)
    weights = correction_weights(log_pi[kept].detach(), log_mu, kept, CorrectionConfig(**settings))
    loss, _ = policy_loss(
        log_pi[kept], log_pi[kept].detach(), torch.ones(3), kept, ClipLossConfig()
    )
    (got,) = torch.autograd.grad((log_mu.exp() * weights * -loss).sum(), logits)
    pi = log_pi.exp().detach()
    want = torch.zeros(5, dtype=torch.float64)
    for y in range(3):
        mu = log_mu[y].exp().item()
        score = torch.eye(5, dtype=torch.float64)[y] - pi
        want += mu * weight(pi[y].item(), mu) * score
    assert distance(got, want) < EXACT


def test_uncapped_token_weights_give_the_gradient_of_the_surrogate(world: World) -> None:
    """Conservative policy iteration's: sum over prefixes of mu(prefix) E_pi[Q_mu]; autograd."""
    values = [[world.reach(p) * world.returns_of_mu((*p, v)) for v in range(3)] for p in PREFIXES]
    surrogate = (world.log_pi().exp() * torch.tensor(values, dtype=torch.float64)).sum()
    assert distance(world.expected(kind="tis", cap=0), world.gradient(surrogate)) < EXACT


def test_token_weights_are_biased_for_returns_in_first_order_of_the_mismatch(
    world: World,
) -> None:
    assert distance(world.expected(kind="tis", cap=0), world.on_policy()) > 0.1
    biases = []
    for step in (0.02, 0.01):
        near = World(taus=(1 + step, 1 - step, 1 - 2 * step))
        biases.append(distance(near.expected(kind="tis", cap=0), near.on_policy()))
    assert biases[0] / biases[1] == pytest.approx(2, rel=0.05)
    here = World(taus=(1.0, 1.0, 1.0))
    assert distance(here.expected(kind="tis", cap=0), here.on_policy()) < EXACT


def test_products_up_to_the_token_are_exact_for_values_of_pi_and_not_for_returns(
    world: World,
) -> None:
    """The module says so; the weights are built here, since no kind has them."""
    log_pi, log_mu = world.packed(), world.packed(tempered=True).detach()
    old, mu = log_pi.detach(), world.answers(tempered=True).detach()
    ratios = (old - log_mu).split(torch.bincount(IDS).tolist())
    weights = torch.cat([part.cumsum(0) for part in ratios]).exp()
    pi = world.answers().detach()
    pieces = [(a[: t + 1], i) for i, a in enumerate(ANSWERS) for t in range(len(a))]
    values = []
    for begun, _ in pieces:
        mine = torch.tensor([answer[: len(begun)] == begun for answer in ANSWERS])
        values.append((pi * world.returns)[mine].sum() / pi[mine].sum())

    def expected(advantages: Tensor) -> Tensor:
        loss, _ = policy_loss(log_pi, old, advantages, IDS, ClipLossConfig())
        (result,) = torch.autograd.grad(
            -(mu[IDS] * weights * loss).sum(), world.logits, retain_graph=True
        )
        return result

    want = world.on_policy()
    assert distance(expected(torch.stack(values)), want) < EXACT
    assert distance(expected(world.returns[IDS]), want) > 0.02


def test_annealed_trains_the_tempered_policy(world: World) -> None:
    got = world.expected(tempered=True, kind="annealed")
    assert distance(got, world.on_policy(tempered=True)) < EXACT
    assert distance(got, world.on_policy()) > 0.1


def test_no_correction_gives_the_gradient_of_neither_policy(world: World) -> None:
    got = world.expected(kind="none")
    assert distance(got, world.on_policy()) > 0.1
    assert distance(got, world.on_policy(tempered=True)) > 0.1


def test_capped_sequence_weights_have_the_bias_and_variance_of_theory(world: World) -> None:
    """min(pi(y), cap mu(y)) in place of pi(y): from the answers' probabilities."""
    pi, mu = world.answers(), world.answers(tempered=True).detach()
    cap = 1.5
    kept = torch.minimum(pi.detach(), cap * mu)
    assert (kept < pi).any()
    want = world.gradient((kept * pi.log() * world.returns).sum())
    assert distance(world.expected(kind="sequence", cap=cap), want) < EXACT

    scores = torch.stack(
        [torch.autograd.grad(p.log(), world.logits, retain_graph=True)[0] for p in world.answers()]
    )
    square = (kept**2 / mu * world.returns**2 * scores.square().sum(dim=(1, 2))).sum()
    got = (mu * world.each(kind="sequence", cap=cap).square().sum(dim=(1, 2))).sum()
    assert got.item() == pytest.approx(square.item(), rel=1e-12)


def test_a_cap_trades_variance_for_bias(world: World) -> None:
    mu, exact = world.answers(tempered=True).detach(), world.on_policy()
    biases, variances = [], []
    for cap in (1.0, 1.5, 3.0, 0):
        mean, gradients = (
            world.expected(kind="sequence", cap=cap),
            world.each(kind="sequence", cap=cap),
        )
        biases.append((mean - exact).norm().item())
        variances.append((mu * (gradients - mean).square().sum(dim=(1, 2))).sum().item())
    assert biases == sorted(biases, reverse=True)
    assert variances == sorted(variances)
    assert biases[-1] < EXACT


@pytest.mark.parametrize("kind", ["tis", "sequence"])
def test_a_baseline_changes_the_expectation_only_under_a_cap(world: World, kind: Any) -> None:
    uncapped, capped = world.expected(kind=kind, cap=0), world.expected(kind=kind, cap=1.2)
    world.returns = world.returns - 0.7
    assert distance(world.expected(kind=kind, cap=0), uncapped) < 10 * EXACT
    assert distance(world.expected(kind=kind, cap=1.2), capped) > 0.01


@pytest.mark.parametrize(("settings", "weight"), TOKEN_LEVEL)
def test_sampled_updates_have_the_mean_and_variance_of_theory(
    world: World, settings: dict[str, Any], weight: Callable[[float, float], float]
) -> None:
    """20,000 answers drawn from mu, as one batch. Each of 21 means and the mean square within 6
    standard errors: false alarm below 1e-7."""
    count = 20_000
    mu = world.answers(tempered=True).detach()
    drawn = torch.multinomial(
        mu, count, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    tokens = torch.cat([(answer == IDS).nonzero().squeeze(1) for answer in drawn.tolist()])
    lengths = torch.bincount(IDS)[drawn]
    ids = torch.arange(count).repeat_interleave(lengths)
    log_pi, log_mu = world.packed()[tokens], world.packed(tempered=True).detach()[tokens]
    old = log_pi.detach()
    weights = correction_weights(old, log_mu, ids, CorrectionConfig(**settings))
    loss, _ = policy_loss(log_pi, old, world.returns[drawn][ids], ids, ClipLossConfig())
    got = world.gradient(-(weights * loss).sum() / count)

    mean, square = world.theory(weight)
    gradients = world.each(**settings).flatten(1)
    squares = gradients.square().sum(dim=1)
    errors = ((mu @ gradients.square() - mean.flatten() ** 2) / count).sqrt()
    assert ((got - mean).flatten().abs() <= 6 * errors + EXACT).all()
    error = math.sqrt(((mu @ squares**2).item() - square**2) / count)
    assert abs(squares[drawn].mean().item() - square) < 6 * error


# Weights and metrics


logprobs = st.floats(-6, -0.01)


@given(
    st.lists(st.tuples(logprobs, logprobs, st.integers(0, 3)), min_size=1, max_size=12),
    st.sampled_from(["none", "tis", "mis", "icepop", "sequence", "annealed"]),
    st.one_of(st.just(0.0), st.floats(0.5, 4)),
)
def test_weights_equal_their_formula(
    tokens: list[tuple[float, float, int]], kind: Any, cap: float
) -> None:
    config = CorrectionConfig(kind=kind, cap=cap, low=0.4, high=3.0)
    tokens.sort(key=lambda token: token[2])
    old = torch.tensor([token[0] for token in tokens], dtype=torch.float64, requires_grad=True)
    behaviour = torch.tensor([token[1] for token in tokens], dtype=torch.float64)
    ids = torch.tensor([token[2] for token in tokens])
    got = correction_weights(old, behaviour, ids, config)
    assert not got.requires_grad
    most = cap or math.exp(20)
    for weight, (pi, mu, answer) in zip(got.tolist(), tokens, strict=True):
        ratio = math.exp(pi - mu)
        whole = math.exp(sum(p - m for p, m, a in tokens if a == answer))
        want = {
            "none": 1.0,
            "annealed": 1.0,
            "tis": min(ratio, most),
            "mis": ratio if ratio <= most else 0.0,
            "icepop": ratio if 0.4 <= ratio <= 3.0 else 0.0,
            "sequence": min(whole, most),
        }[kind]
        assert weight == pytest.approx(want, rel=1e-9)


def ratios(*values: float) -> tuple[Tensor, Tensor, Tensor]:
    """log pi_old and log mu of one answer's tokens with these ratios, and its sequence ids."""
    behaviour = torch.full((len(values),), -3.0)
    ids = torch.zeros(len(values), dtype=torch.int64)
    return behaviour + torch.tensor(values).log(), behaviour, ids


@pytest.mark.parametrize(
    ("settings", "weights", "capped"),
    [
        ({"kind": "tis"}, (1, 2, 2, 0.4), 0.25),
        ({"kind": "mis", "cap": 2.1}, (1, 2, 0, 0.4), 0.25),
        ({"kind": "icepop"}, (1, 2, 0, 0), 0.5),
        ({"kind": "none"}, (1, 1, 1, 1), 0),
    ],
)
def test_metrics_of_known_weights(
    settings: dict[str, Any], weights: tuple[float, ...], capped: float
) -> None:
    got = correction_metrics(*ratios(1, 2, 6, 0.4), CorrectionConfig(**settings))
    assert got["weight_mean"] == pytest.approx(sum(weights) / 4)
    assert got["weight_max"] == pytest.approx(max(weights))
    assert got["weight_capped"] == pytest.approx(capped)
    size = sum(weights) ** 2 / (4 * sum(w**2 for w in weights))
    assert got["effective_sample_size"] == pytest.approx(size, rel=1e-6)
    assert got["kl"] == pytest.approx(-math.log(1 * 2 * 6 * 0.4) / 4)


def test_sequence_metrics_count_answers_and_not_their_tokens() -> None:
    """Answers of 1 and 3 tokens: weights 0.5 and 2 (8 before the cap)."""
    old, behaviour, _ = ratios(0.5, 2, 2, 2)
    ids = torch.tensor([0, 1, 1, 1])
    got = correction_metrics(old, behaviour, ids, CorrectionConfig(kind="sequence"))
    assert got["weight_mean"] == pytest.approx(1.25)
    assert got["weight_capped"] == pytest.approx(0.5)
    assert got["effective_sample_size"] == pytest.approx(2.5**2 / (2 * 4.25))


def test_the_effective_sample_size_of_whole_answers_decays_exponentially() -> None:
    """mu tosses a fair coin, pi one of 3/4: chi^2 = 1/4, so 0.8 per token, and 0.8^length per
    answer. All 2^length answers are there once, which is exactly mu's distribution."""
    length = 6
    bits = torch.cartesian_prod(*[torch.arange(2)] * length).flatten()
    ids = torch.arange(2**length).repeat_interleave(length)
    old = torch.tensor([0.75, 0.25]).log()[bits]
    behaviour = torch.full_like(old, 0.5).log()
    for kind, want in (("tis", 0.8), ("sequence", 0.8**length)):
        got = correction_metrics(old, behaviour, ids, CorrectionConfig(kind=kind, cap=0))
        assert got["effective_sample_size"] == pytest.approx(want, rel=1e-5)
        assert got["weight_mean"] == pytest.approx(1, rel=1e-5)


def test_kl_and_entropy_are_reported_by_position() -> None:
    lengths = (20, 70)
    ids = torch.arange(2).repeat_interleave(torch.tensor(lengths)) + 5
    positions = torch.cat([torch.arange(length) for length in lengths]).float()
    got = correction_metrics(
        -positions, torch.zeros(90), ids, CorrectionConfig(), entropies=2 * positions
    )
    means = {"0-15": 7.5, "16-63": None, "64-255": 66.5}
    means["16-63"] = (sum(range(16, 20)) + sum(range(16, 64))) / (4 + 48)
    assert {name for name in got if name.startswith("kl/")} == {f"kl/{b}" for b in means}
    for bucket, mean in means.items():
        assert got[f"kl/{bucket}"] == pytest.approx(mean)
        assert got[f"entropy/{bucket}"] == pytest.approx(2 * mean)
    late = correction_metrics(
        torch.zeros(5000), torch.zeros(5000), torch.zeros(5000).int(), CorrectionConfig()
    )
    assert late["kl/4096-"] == 0


def test_collapsed_sequence_weights_are_warned_of_once() -> None:
    """Answers of 1,000 tokens at a ratio of 0.84: weights of 1e-76, finite figures all the same."""
    old = torch.full((4000,), math.log(0.84))
    ids = torch.arange(4).repeat_interleave(1000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            got = correction_metrics(old, torch.zeros(4000), ids, CorrectionConfig(kind="sequence"))
            correction_metrics(old, torch.zeros(4000), ids, CorrectionConfig(kind="tis"))
    assert [warning.category for warning in caught] == [RuntimeWarning]
    assert got["weight_mean"] < 1e-30
    assert got["effective_sample_size"] == pytest.approx(1)


def test_weights_that_are_all_zero_have_no_sample() -> None:
    got = correction_metrics(*ratios(9, 9), CorrectionConfig(kind="icepop"))
    assert got["effective_sample_size"] == 0
    assert all(math.isfinite(value) for value in got.values())


def test_which_policy_is_trained_is_said() -> None:
    assert CorrectionConfig(kind="annealed").trained_policy == "tempered"
    assert CorrectionConfig().trained_policy == "temperature 1"


@pytest.mark.parametrize(
    "settings", [{"cap": -1.0}, {"low": 2.0, "high": 1.0}, {"kind": "is"}, {"capp": 1.0}]
)
def test_settings_that_cannot_be_honoured_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CorrectionConfig(**settings)


# verl and TRL, on the same tensors


@pytest.fixture
def mismatch() -> tuple[Tensor, Tensor, Tensor]:
    """log pi_old, log mu and sequence ids of four answers."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.arange(4).repeat_interleave(torch.tensor([3, 7, 1, 5]))
    noise = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    return noise[0] - 3, noise[0] + noise[1] - 3, ids


@pytest.mark.parametrize(
    ("settings", "level", "threshold"),
    [
        ({"kind": "tis"}, "token", 2.0),
        ({"kind": "icepop"}, "token", "0.5_5.0"),
        ({"kind": "sequence"}, "sequence", 2.0),
    ],
)
def test_weights_and_metrics_equal_verls(
    mismatch: tuple[Tensor, Tensor, Tensor],
    settings: dict[str, Any],
    level: str,
    threshold: Any,
) -> None:
    old, behaviour, ids = mismatch
    helper = "verl/trainer/ppo/rollout_corr_helper.py"
    verl_F = functions("verl", "verl/utils/torch_functional.py", "masked_sum", "masked_mean")
    names = ("_parse_rollout_is_threshold", "compute_is_metrics", "SAFETY_BOUND")
    parts = functions("verl", helper, *names, verl_F=verl_F, Optional=None)
    verl = functions(
        "verl",
        helper,
        "compute_rollout_correction_weights",
        "compute_offpolicy_metrics",
        verl_F=verl_F,
        **vars(parts),
    )
    mask = padded(torch.ones_like(old), ids)
    want, figures = verl.compute_rollout_correction_weights(
        padded(old - behaviour, ids), mask, level, threshold
    )
    config = CorrectionConfig(**settings)
    got = correction_weights(old, behaviour, ids, config)
    assert torch.allclose(padded(got, ids), want, rtol=1e-9)

    metrics = correction_metrics(old, behaviour, ids, config)
    kl = verl.compute_offpolicy_metrics(padded(old, ids), padded(behaviour, ids), mask)["kl"]
    assert metrics["kl"] == pytest.approx(kl, rel=1e-6)
    if level == "token":  # verl's sequence figures count tokens, ours answers
        assert metrics["weight_mean"] == pytest.approx(figures["rollout_is_mean"], rel=1e-6)
        assert metrics["weight_max"] == pytest.approx(figures["rollout_is_max"], rel=1e-6)
        size = figures["rollout_is_eff_sample_size"]
        assert metrics["effective_sample_size"] == pytest.approx(size, rel=1e-6)
        outside = figures.get("rollout_is_oob_ratio", figures["rollout_is_ratio_fraction_high"])
        assert metrics["weight_capped"] == pytest.approx(outside, rel=1e-6)
        assert 0 < outside < 1


@pytest.mark.parametrize(
    ("settings", "mode", "least"),
    [
        ({"kind": "tis"}, "token_truncate", None),
        ({"kind": "mis"}, "token_mask", None),
        ({"kind": "icepop", "low": 0.6, "high": 2.0}, "token_mask", 0.6),
        ({"kind": "sequence"}, "sequence_truncate", None),
    ],
)
def test_weights_equal_trls(
    mismatch: tuple[Tensor, Tensor, Tensor],
    settings: dict[str, Any],
    mode: str,
    least: float | None,
) -> None:
    class Trainer:
        vllm_importance_sampling_mode = mode
        vllm_importance_sampling_clip_min = least
        vllm_importance_sampling_clip_max = 2.0

    old, behaviour, ids = mismatch
    mask = padded(torch.ones_like(old), ids)
    want = branch(
        "trl",
        "trl/trainer/grpo_trainer.py",
        "self.use_vllm and self.vllm_importance_sampling_correction",
        "vllm_importance_sampling_ratio",
        self=Trainer,
        completion_mask=mask,
        tool_mask=None,
        old_per_token_logps=padded(old, ids),
        sampling_per_token_logps=padded(behaviour, ids),
    )
    got = correction_weights(old, behaviour, ids, CorrectionConfig(**settings))
    assert torch.allclose(padded(got, ids), want * mask)
    assert (got != (old - behaviour).exp()).any()
