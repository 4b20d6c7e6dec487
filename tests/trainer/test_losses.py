"""The losses against float64 computations written out here, against enumeration, verl and TRL."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.trainers import functions, padded
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from trainer_bridge.algorithms.loss_config import (
    CispoLossConfig,
    ClipCovLossConfig,
    ClipLossConfig,
    GspoLossConfig,
    KlCovLossConfig,
    LossConfig,
)
from trainer_bridge.algorithms.losses import (
    aggregation_weights,
    covariance_tokens,
    kl_estimate,
    kl_penalties,
    peak_entropy,
    policy_loss,
    regularisation,
    selective_entropy_loss,
)

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")
LOSS = TypeAdapter[LossConfig](LossConfig)


def batch(seed: int = 0, spread: float = 0.4, count: int = 6) -> dict[str, Tensor]:
    """Packed answers of 1 to 9 tokens in float64; ratios around exp(+-spread)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (count,), generator=generator)
    size = int(lengths.sum())
    noise = torch.randn(3, size, generator=generator, dtype=torch.float64)
    return {
        "logprobs": (-1.5 + noise[0]).clamp(max=-0.01).requires_grad_(),
        "old_logprobs": (-1.5 + noise[0]).clamp(max=-0.01) + spread * noise[1],
        "advantages": noise[2],
        "sequence_ids": torch.arange(count).repeat_interleave(lengths),
    }


def per_answer(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """A value per answer, for each of its tokens: that of its first token."""
    firsts = [int((sequence_ids == answer).nonzero()[0]) for answer in sequence_ids.unique()]
    return values[firsts][sequence_ids]


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(loss, of, retain_graph=True)
    return result


@st.composite
def tokens(draw: st.DrawFn) -> tuple[float, float, float]:
    """log pi, log pi_old and advantage of a token. Hundredths: ties and bounds are met exactly."""
    hundredth = st.integers(-300, 0).map(lambda number: number / 100)
    advantage = st.integers(-200, 200).map(lambda number: number / 100)
    return draw(hundredth), draw(hundredth), draw(advantage)


clips = st.floats(0.05, 0.9)


@given(tokens(), clips, clips, st.one_of(st.just(0.0), st.floats(1.95, 5)))
def test_the_clipped_loss_equals_its_formula(
    token: tuple[float, float, float], low: float, high: float, dual: float
) -> None:
    """Value, gradient and `clipped`, each from the cases of the docstring."""
    pi, old, advantage = token
    logprobs = torch.tensor([pi], dtype=torch.float64, requires_grad=True)
    loss, clipped = policy_loss(
        logprobs,
        torch.tensor([old], dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        torch.zeros(1, dtype=torch.int64),
        ClipLossConfig(clip_low=low, clip_high=high, dual_clip=dual),
    )
    ratio = math.exp(pi - old)
    bounded = min(max(ratio, 1 - low), 1 + high)
    want = -min(ratio * advantage, bounded * advantage)
    if advantage < 0 and dual:
        want = min(want, -dual * advantage)
    assert loss.item() == pytest.approx(want, abs=1e-12)
    held = bool(
        (advantage > 0 and ratio > 1 + high)
        or (advantage < 0 and ratio < 1 - low)
        or (advantage < 0 and dual and ratio > dual)
    )
    assert clipped.item() == held
    slope = 0.0 if held else -ratio * advantage
    assert gradient(loss.sum(), logprobs).item() == pytest.approx(slope, abs=1e-12)


def test_no_ratio_however_extreme_gives_anything_but_numbers() -> None:
    logprobs = torch.tensor([-1000.0, -0.1, -1000.0, -0.1], requires_grad=True)
    old = torch.tensor([-0.1, -1000.0, -0.1, -1000.0])
    advantages = torch.tensor([1.0, 1.0, -1.0, 0.0])
    for config in (ClipLossConfig(), CispoLossConfig(), GspoLossConfig()):
        loss, _ = policy_loss(logprobs, old, advantages, torch.arange(4), config)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient(loss.sum(), logprobs)).all()


def test_cispo_keeps_the_gradient_of_every_token_at_its_bounded_weight() -> None:
    given_ = batch(1, spread=1.0)
    config = CispoLossConfig(clip_low=0.5, clip_high=0.7)
    loss, clipped = policy_loss(**given_, config=config)
    ratio = (given_["logprobs"] - given_["old_logprobs"]).exp().detach()
    bounded = ratio.clamp(0.5, 1.7)
    assert torch.allclose(loss, -bounded * given_["advantages"] * given_["logprobs"])
    assert torch.allclose(gradient(loss.sum(), given_["logprobs"]), -bounded * given_["advantages"])
    assert torch.equal(clipped, (ratio < 0.5) | (ratio > 1.7))
    assert 0 < clipped.sum() < len(clipped)


def test_gspo_has_value_and_gradient_of_its_sequence_form() -> None:
    """The mean over answers of min(s A, clip(s) A), differentiated as it stands."""
    given_ = batch(2, spread=0.6)
    ids = given_["sequence_ids"]
    given_["advantages"] = per_answer(given_["advantages"], ids)
    config = GspoLossConfig(clip_low=0.1, clip_high=0.15)
    assert config.aggregation == "seq-mean-token-mean"
    loss, clipped = policy_loss(**given_, config=config)
    got = (aggregation_weights(ids, config.aggregation) * loss).sum()
    objective, held = [], []
    for answer in ids.unique():
        mine = ids == answer
        ratio = (given_["logprobs"] - given_["old_logprobs"])[mine].mean().exp()
        advantage = given_["advantages"][mine][0]
        bounded = ratio.clamp(0.9, 1.15)
        objective.append(torch.minimum(ratio * advantage, bounded * advantage))
        held += [(bounded * advantage < ratio * advantage).item()] * int(mine.sum())
    want = -torch.stack(objective).mean()
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    assert torch.allclose(
        gradient(got, given_["logprobs"]), gradient(want, given_["logprobs"]), rtol=1e-6
    )
    assert clipped.tolist() == held
    assert 0 < sum(held) < len(held)


def test_gspo_weighs_each_tokens_own_advantage_by_its_answers_ratio() -> None:
    given_ = batch(3)
    ids = given_["sequence_ids"]
    config = GspoLossConfig(clip_low=1, clip_high=100)
    loss, _ = policy_loss(**given_, config=config)
    log_ratio = (given_["logprobs"] - given_["old_logprobs"]).detach()
    ratio = torch.stack([log_ratio[ids == answer].mean().exp() for answer in ids.unique()])[ids]
    assert torch.allclose(gradient(loss.sum(), given_["logprobs"]), -ratio * given_["advantages"])


def covariances(given_: dict[str, Tensor]) -> Tensor:
    logprobs, advantages = given_["old_logprobs"], given_["advantages"]
    return (logprobs - logprobs.mean()) * (advantages - advantages.mean())


def test_kl_cov_penalises_the_tokens_of_highest_covariance() -> None:
    given_ = batch(4, count=40)
    config = KlCovLossConfig(covariance_share=0.1, kl_cov_coefficient=0.7)
    selected = covariance_tokens(given_["old_logprobs"], given_["advantages"], config)
    size = len(selected)
    best = sorted(range(size), key=lambda t: -covariances(given_)[t])[: int(0.1 * size)]
    assert sorted(selected.nonzero().squeeze(1).tolist()) == sorted(best)
    loss, clipped = policy_loss(**given_, config=config, selected=selected)
    difference = given_["logprobs"] - given_["old_logprobs"]
    want = -difference.exp() * given_["advantages"]
    want = torch.stack(
        [want[t] + 0.7 * difference[t].abs() if t in best else want[t] for t in range(size)]
    )
    assert torch.allclose(loss, want)
    assert torch.allclose(
        gradient(loss.sum(), given_["logprobs"]), gradient(want.sum(), given_["logprobs"])
    )
    assert not clipped.any()


def test_clip_cov_drops_tokens_drawn_from_a_band_of_covariances() -> None:
    """Every token of the band is drawn about equally often: 200 draws of 5 of the band's tokens,
    each within 6 standard deviations of its expectation (false alarm below 1e-7)."""
    given_ = batch(5, count=60)
    config = ClipCovLossConfig(covariance_share=5 / 300, covariance_low=0.1, covariance_high=0.8)
    inside = (covariances(given_) > 0.1) & (covariances(given_) < 0.8)
    chosen = int(config.covariance_share * len(inside))
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(len(inside))
    for _ in range(200):
        selected = covariance_tokens(
            given_["old_logprobs"], given_["advantages"], config, generator=generator
        )
        assert selected.sum() == chosen
        counts += selected
    assert not counts[~inside].any()
    share = chosen / int(inside.sum())
    deviation = math.sqrt(200 * share * (1 - share))
    assert ((counts[inside] - 200 * share).abs() < 6 * deviation).all()

    loss, clipped = policy_loss(**given_, config=config, selected=selected)
    plain, held = policy_loss(**given_, config=ClipLossConfig(dual_clip=0))
    assert torch.equal(loss, torch.where(selected, 0.0, plain))
    assert torch.equal(clipped, held | selected)


def test_a_selection_is_never_empty_handed_nor_forgotten() -> None:
    given_ = batch(6)
    config = KlCovLossConfig()  # 2e-4 of some thirty tokens
    selected = covariance_tokens(given_["old_logprobs"], given_["advantages"], config)
    assert selected.sum() == 1
    nothing = ClipCovLossConfig(covariance_low=50, covariance_high=60)
    assert not covariance_tokens(given_["old_logprobs"], given_["advantages"], nothing).any()
    assert not covariance_tokens(
        given_["old_logprobs"], given_["advantages"], ClipLossConfig()
    ).any()
    with pytest.raises(ValueError, match="selected"):
        policy_loss(**given_, config=config)


# Aggregation


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(7, 50))
def test_aggregates_are_the_means_they_are_named_after(lengths: list[int], most: int) -> None:
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    values = torch.linspace(-1, 2, len(ids), dtype=torch.float64)
    sums = [values[ids == answer].sum().item() for answer in range(len(lengths))]
    want = {
        "token-mean": sum(sums) / len(ids),
        "seq-mean-token-mean": sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(sums),
        "seq-mean-token-sum-norm": sum(sums) / len(sums) / most,
    }
    for how in AGGREGATIONS:
        weights = aggregation_weights(ids, how, max_tokens=most)
        assert weights.dtype == torch.float32
        assert (weights * values).sum().item() == pytest.approx(want[how], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize(
    ("kind", "selection"),
    [
        ("clip", {}),
        ("cispo", {}),
        ("gspo", {}),
        ("clip_cov", {"covariance_share": 0.2, "covariance_low": 0.0}),
        ("kl_cov", {"covariance_share": 0.2}),
    ],
)
def test_micro_batches_add_up_to_the_batch(
    kind: str, selection: dict[str, float], how: str
) -> None:
    """Gradients of whole answers one by one, against all at once: equal to rounding."""
    given_ = batch(7)
    logprobs, ids = given_["logprobs"], given_["sequence_ids"]
    config = LOSS.validate_python(
        {
            "kind": kind,
            "aggregation": how,
            "kl_coefficient": 0.1,
            "entropy_coefficient": 0.02,
            "selective_entropy_coefficient": 0.3,
            **selection,
        }
    )
    selected = covariance_tokens(given_["old_logprobs"], given_["advantages"], config)
    weights = aggregation_weights(ids, how, max_tokens=10)
    before = -given_["old_logprobs"]  # stands for the batch's entropies

    def loss(part: Tensor) -> Tensor:
        arguments = {name: tensor[part] for name, tensor in given_.items()}
        per_token, _ = policy_loss(**arguments, config=config, selected=selected[part])
        entropies = before[part] + logprobs[part] - logprobs[part].detach()
        reference = given_["old_logprobs"][part] - 0.3
        per_token = per_token + regularisation(logprobs[part], entropies, config, reference)
        selective = selective_entropy_loss(entropies, 0.5, config, batch=before)
        return (weights[part] * per_token).sum() + selective

    whole = loss(torch.ones_like(ids, dtype=torch.bool))
    parts = [loss(ids == answer) for answer in ids.unique()]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-12)
    summed = torch.stack([gradient(part, logprobs) for part in parts]).sum(dim=0)
    assert torch.allclose(summed, gradient(whole, logprobs), atol=1e-15)


def test_token_sums_need_a_constant() -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        aggregation_weights(torch.zeros(2, dtype=torch.int64), "seq-mean-token-sum-norm")


# KL: expectations over a distribution of five tokens, as sums


@pytest.fixture
def distributions() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, log pi and log reference of five tokens."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    return logits, logits.log_softmax(0), torch.randn(5, dtype=torch.float64).log_softmax(0)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


def test_values_of_k1_and_k3_are_unbiased_and_k2_is_close_for_close_policies(
    distributions: tuple[Tensor, Tensor, Tensor],
) -> None:
    _, log_pi, reference = distributions
    want = divergence(log_pi, reference).item()
    for kind in ("k1", "k3"):
        mean = (log_pi.exp() * kl_estimate(log_pi, reference, kind)).sum().item()
        assert mean == pytest.approx(want, abs=1e-14)
    assert (kl_estimate(log_pi, reference, "k3") >= 0).all()
    errors = []
    for step in (0.1, 0.01):
        near = (log_pi + step * (reference - log_pi)).log_softmax(0)
        mean = (log_pi.exp() * kl_estimate(log_pi, near, "k2")).sum()
        errors.append((mean / divergence(log_pi, near) - 1).abs().item())
    assert errors[0] < 0.1
    assert errors[1] < 0.2 * errors[0]  # of first order in the distance


def test_gradients_of_the_estimators_in_the_loss(
    distributions: tuple[Tensor, Tensor, Tensor],
) -> None:
    """k2 has the gradient of KL(pi || reference), k3 of KL(reference || pi), k1 none."""
    logits, log_pi, reference = distributions

    def expected(kind: Any) -> Tensor:
        return gradient(
            (log_pi.exp().detach() * kl_estimate(log_pi, reference, kind)).sum(), logits
        )

    assert torch.allclose(expected("k2"), gradient(divergence(log_pi, reference), logits))
    assert torch.allclose(expected("k3"), gradient(divergence(reference, log_pi), logits))
    assert torch.allclose(expected("k1"), torch.zeros(5, dtype=torch.float64), atol=1e-15)
    one_token = kl_estimate(log_pi, reference, "k1")[2]
    assert torch.allclose(gradient(one_token, logits), gradient(log_pi[2], logits))


def test_gradients_of_the_estimators_in_the_reward(
    distributions: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Only k1 has that of KL(pi || reference); k2 and k3 have neither direction's."""
    logits, log_pi, reference = distributions
    ids = torch.arange(5)

    def expected(kind: Any) -> Tensor:
        config = ClipLossConfig(kl_coefficient=2.0, kl_estimator=kind, kl_in="reward")
        penalty = kl_penalties(log_pi, reference, ids, config) / 2.0
        assert not penalty.requires_grad
        return gradient((log_pi.exp().detach() * penalty * log_pi).sum(), logits)

    there = gradient(divergence(log_pi, reference), logits)
    back = gradient(divergence(reference, log_pi), logits)
    assert torch.allclose(expected("k1"), there)
    for kind in ("k2", "k3"):
        assert not torch.allclose(expected(kind), there, rtol=0.1)
        assert not torch.allclose(expected(kind), back, rtol=0.1)


def test_an_answers_kl_penalty_sums_its_tokens() -> None:
    given_ = batch(8)
    config = ClipLossConfig(kl_coefficient=0.5, kl_estimator="k1", kl_in="reward")
    got = kl_penalties(given_["logprobs"], given_["old_logprobs"], given_["sequence_ids"], config)
    for answer, penalty in enumerate(got.tolist()):
        mine = given_["sequence_ids"] == answer
        want = 0.5 * (given_["logprobs"] - given_["old_logprobs"])[mine].sum().item()
        assert penalty == pytest.approx(want)


def test_regularisation_is_kl_less_entropy() -> None:
    given_ = batch(9)
    logprobs, reference, entropies = (
        given_["logprobs"],
        given_["old_logprobs"],
        given_["advantages"],
    )
    config = ClipLossConfig(kl_coefficient=0.3, kl_estimator="k3", entropy_coefficient=0.2)
    got = regularisation(logprobs, entropies, config, reference)
    difference = logprobs - reference
    assert torch.allclose(got, 0.3 * ((-difference).exp() - 1 + difference) - 0.2 * entropies)
    assert torch.equal(regularisation(logprobs, entropies, ClipLossConfig()), torch.zeros_like(got))
    in_reward = config.model_copy(update={"kl_in": "reward"})
    assert torch.allclose(regularisation(logprobs, entropies, in_reward), -0.2 * entropies)
    with pytest.raises(ValueError, match="reference"):
        regularisation(logprobs, entropies, config)


# SIREN


def test_peak_entropies_are_pulled_to_the_anchor() -> None:
    """Value and gradient of coefficient * (mean of the peaks - anchor)^2, differentiated as is."""
    entropies = torch.tensor(
        [0.1, 2.0, 0.5, 3.0, 0.2, 1.0], dtype=torch.float64, requires_grad=True
    )
    config = ClipLossConfig(selective_entropy_coefficient=0.5, selective_entropy_quantile=0.5)
    mean, threshold = peak_entropy(entropies, 0.5)
    assert (mean.item(), threshold.item()) == (2.0, 1.0)
    got = selective_entropy_loss(entropies, 1.2, config)
    want = 0.5 * (entropies[[1, 3, 5]].mean() - 1.2) ** 2
    assert got.item() == pytest.approx(want.item())
    assert torch.allclose(gradient(got, entropies), gradient(want, entropies))
    assert selective_entropy_loss(entropies, mean.item(), config).item() == 0


# Settings


def test_defaults_are_those_of_the_kinds_paper() -> None:
    clip, cispo, gspo = ClipLossConfig(), CispoLossConfig(), GspoLossConfig()
    assert (clip.clip_low, clip.clip_high, clip.aggregation) == (0.2, 0.28, "token-mean")
    assert (cispo.clip_low, cispo.clip_high) == (1, 4)
    assert (gspo.clip_low, gspo.clip_high) == (3e-4, 4e-4)
    assert gspo.aggregation == "seq-mean-token-mean"
    assert GspoLossConfig(clip_low=0.1).clip_low == 0.1
    assert LOSS.validate_python({}) == clip
    for config in (clip, cispo, gspo, ClipCovLossConfig(), KlCovLossConfig()):
        assert LOSS.validate_python({"kind": config.kind}) == config
        # a run's resolved settings read back as themselves
        assert LOSS.validate_python(config.model_dump()) == config
        assert LOSS.validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"kl_coefficient": 0.1, "kl_estimator": "k1"}, "does not depend on the reference"),
        ({"kind": "clip_cov", "covariance_low": 6.0}, "covariance_low must not be above"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"clip_high": float("nan")}, "clip_high"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"kind": "ppo"}, "kind"),
        ({"cliphigh": 0.3}, "cliphigh"),
        # what a kind never reads
        ({"kind": "gspo", "covariance_share": 0.1}, "'gspo' has no such setting"),
        ({"kind": "cispo", "dual_clip": 3.0}, "'cispo' has no such setting"),
        ({"kind": "clip_cov", "kl_cov_coefficient": 1.0}, "'clip_cov' has no such setting"),
        ({"kind": "kl_cov", "clip_low": 0.2}, "'kl_cov' has no such setting"),
        ({"covariance_low": 1.0}, "'clip' has no such setting"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(
    settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValidationError, match=complaint):
        LOSS.validate_python(settings)


# verl and TRL, on the same tensors: value and gradient of the aggregated loss


class ActorConfig(SimpleNamespace):
    """What verl's losses read of their configuration."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def verl_loss(name: str, given_: dict[str, Tensor], config: LossConfig) -> Tensor:
    helpers = functions("verl", "verl/utils/torch_functional.py", "masked_sum", "masked_mean")
    core = "verl/trainer/ppo/core_algos.py"
    agg_loss = functions("verl", core, "agg_loss", verl_F=helpers).agg_loss
    function = functions(
        "verl",
        core,
        name,
        verl_F=helpers,
        agg_loss=agg_loss,
        ActorConfig=ActorConfig,
        AlgoConfig=type(None),
    )
    ids = given_["sequence_ids"]
    ours = config.model_dump()  # a function reads only what its kind has
    loss, _ = getattr(function, name)(
        old_log_prob=padded(given_["old_logprobs"], ids),
        log_prob=padded(given_["logprobs"], ids),
        advantages=padded(given_["advantages"], ids),
        response_mask=padded(torch.ones_like(given_["advantages"]), ids),
        loss_agg_mode=config.aggregation,
        config=ActorConfig(
            clip_ratio=None,
            clip_ratio_low=ours.get("clip_low"),
            clip_ratio_high=ours.get("clip_high"),
            clip_ratio_c=ours.get("dual_clip", 3.0),
            global_batch_info={"loss_scale_factor": 20},
            policy_loss=SimpleNamespace(
                clip_cov_ratio=ours.get("covariance_share"),
                clip_cov_lb=ours.get("covariance_low"),
                clip_cov_ub=ours.get("covariance_high"),
                kl_cov_ratio=ours.get("covariance_share"),
                ppo_kl_coef=ours.get("kl_cov_coefficient"),
            ),
        ),
    )
    return loss


def our_loss(
    given_: dict[str, Tensor], config: LossConfig, selected: Tensor | None = None
) -> Tensor:
    per_token, _ = policy_loss(**given_, config=config, selected=selected)
    weights = aggregation_weights(given_["sequence_ids"], config.aggregation, max_tokens=20)
    return (weights * per_token).sum()


def assert_same(ours: Tensor, theirs: Tensor, logprobs: Tensor) -> None:
    """To rounding: our aggregation weights are float32, and both add epsilons to divisors."""
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6, abs=1e-7)
    assert torch.allclose(
        gradient(ours, logprobs), gradient(theirs, logprobs), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (ClipLossConfig, "compute_policy_loss_vanilla"),
        (CispoLossConfig, "compute_policy_loss_cispo"),
        (GspoLossConfig, "compute_policy_loss_gspo"),
    ],
)
def test_losses_equal_verls(kind: Any, name: str, aggregation: Any) -> None:
    given_ = batch(10, spread=1.0)  # ratios from 0.1 to 10: every bound is met
    config = kind(clip_low=0.2, clip_high=0.28, aggregation=aggregation)
    assert_same(our_loss(given_, config), verl_loss(name, given_, config), given_["logprobs"])


def test_kl_cov_equals_verls() -> None:
    """With pi_old = pi + a constant, so that both select by the same covariances."""
    given_ = batch(11, spread=0.0)
    given_["old_logprobs"] = given_["logprobs"].detach() + 0.1
    config = KlCovLossConfig(covariance_share=0.2, kl_cov_coefficient=0.5)
    selected = covariance_tokens(given_["old_logprobs"], given_["advantages"], config)
    theirs = verl_loss("compute_policy_loss_kl_cov", given_, config)
    assert_same(our_loss(given_, config, selected), theirs, given_["logprobs"])


def test_clip_cov_equals_verls() -> None:
    """No token is outside the clip, where verl does not select. The same seed draws the same."""
    given_ = batch(12, spread=0.0)
    config = ClipCovLossConfig(covariance_share=0.1, covariance_low=0.05, covariance_high=3.0)
    torch.manual_seed(3)
    selected = covariance_tokens(given_["old_logprobs"], given_["advantages"], config)
    torch.manual_seed(3)
    theirs = verl_loss("compute_policy_loss_clip_cov", given_, config)
    assert selected.any()
    assert_same(our_loss(given_, config, selected), theirs, given_["logprobs"])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimates_equal_verls(kind: Any) -> None:
    verl = functions("verl", "verl/trainer/ppo/core_algos.py", "kl_penalty_forward")
    given_ = batch(13)
    got = kl_estimate(given_["logprobs"], given_["old_logprobs"], kind)
    want = verl.kl_penalty_forward(given_["logprobs"], given_["old_logprobs"], kind)
    assert_same(got.sum(), want.sum(), given_["logprobs"])
    assert torch.allclose(got, want)


def trl_loss(given_: dict[str, Tensor], loss_type: str, **settings: Any) -> Tensor:
    """GRPOTrainer._compute_loss, its forward pass replaced by our log-probabilities."""
    ids = given_["sequence_ids"]
    logprobs = padded(given_["logprobs"], ids)
    mask = padded(torch.ones_like(given_["advantages"]), ids)
    utils = functions("trl", "trl/trainer/utils.py", "nanmin", "nanmax")
    compute = functions("trl", "trl/trainer/grpo_trainer.py", "_compute_loss", **vars(utils))
    trainer = SimpleNamespace(
        **{
            "loss_type": loss_type,
            "importance_sampling_level": "token",
            "epsilon_low": 0.2,
            "epsilon_high": 0.28,
            "beta": 0.0,
            "entropy_coef": 0.0,
            **settings,
        },
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1,
            gather=lambda value: value,
            reduce=lambda value, reduction: value,
            sync_gradients=True,
        ),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        use_adaptive_entropy=False,
        max_completion_length=20,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled="entropy_coef" in settings,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, -logprobs, None),
    )
    empty = torch.zeros(len(mask), 0)
    return compute._compute_loss(
        trainer,
        None,
        {
            "prompt_ids": empty,
            "prompt_mask": empty,
            "completion_ids": torch.zeros_like(mask),
            "completion_mask": mask,
            "advantages": padded(given_["advantages"], ids),
            "old_per_token_logps": padded(given_["old_logprobs"], ids),
            "ref_per_token_logps": padded(given_["old_logprobs"] - 0.3, ids),
            "num_items_in_batch": mask.sum(),
        },
    )


@pytest.mark.parametrize(
    ("loss_type", "aggregation"),
    [
        ("dapo", "token-mean"),
        ("grpo", "seq-mean-token-mean"),
        ("dr_grpo", "seq-mean-token-sum-norm"),
    ],
)
def test_clipped_losses_and_aggregates_equal_trls(loss_type: str, aggregation: Any) -> None:
    given_ = batch(14, spread=1.0)
    config = ClipLossConfig(dual_clip=0, aggregation=aggregation)
    assert_same(our_loss(given_, config), trl_loss(given_, loss_type), given_["logprobs"])


def test_gspo_equals_trls_sequence_level() -> None:
    given_ = batch(15, spread=1.0)
    given_["advantages"] = per_answer(given_["advantages"], given_["sequence_ids"])
    config = GspoLossConfig(clip_low=0.1, clip_high=0.2)
    theirs = trl_loss(
        given_, "grpo", importance_sampling_level="sequence", epsilon_low=0.1, epsilon_high=0.2
    )
    assert_same(our_loss(given_, config), theirs, given_["logprobs"])


def test_cispo_equals_trls() -> None:
    given_ = batch(16, spread=1.5)
    theirs = trl_loss(given_, "cispo", epsilon_high=5.0)
    assert_same(our_loss(given_, CispoLossConfig()), theirs, given_["logprobs"])


def test_regularised_losses_equal_trls() -> None:
    """k3 in the loss (its beta), and the entropy bonus."""
    given_ = batch(17)
    config = ClipLossConfig(
        dual_clip=0, kl_coefficient=0.3, kl_estimator="k3", entropy_coefficient=0.2
    )
    logprobs, reference = given_["logprobs"], given_["old_logprobs"] - 0.3
    weights = aggregation_weights(given_["sequence_ids"], "token-mean")
    extra = (weights * regularisation(logprobs, -logprobs, config, reference)).sum()
    theirs = trl_loss(given_, "dapo", beta=0.3, entropy_coef=0.2)
    assert_same(our_loss(given_, config) + extra, theirs, logprobs)


@pytest.mark.parametrize("gap", [-30.0, -21.0, -19.9, -5.0, 3.0])
def test_k3_always_pulls_towards_the_reference(gap: float) -> None:
    """Case 10: beyond 20 nats the gradient had the other sign. exp(-d) - 1 + d, d < -20: its
    tangent."""
    logprob = torch.tensor([gap - 1.0], dtype=torch.float64, requires_grad=True)
    value = kl_estimate(logprob, torch.tensor([-1.0], dtype=torch.float64), "k3")
    value.sum().backward()
    near = max(gap, -20.0)
    assert logprob.grad is not None
    assert logprob.grad.item() == pytest.approx(1 - math.exp(-near), rel=1e-9)
    exact = math.exp(-near) - 1 + near + (gap - near) * (1 - math.exp(-near))
    assert value.item() == pytest.approx(exact, rel=1e-9)
