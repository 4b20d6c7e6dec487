"""One update: against plain autograd, whatever way it is cut up."""

from __future__ import annotations

import copy
import math
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_models import make_model, sampled
from helpers.updates import GROUPS, SIZE, answers

from trainer_bridge.algorithms.advantages import AdvantageConfig
from trainer_bridge.algorithms.corrections import CorrectionConfig
from trainer_bridge.algorithms.loss_config import (
    CispoLossConfig,
    ClipCovLossConfig,
    ClipLossConfig,
    GspoLossConfig,
    KlCovLossConfig,
    LossConfig,
)
from trainer_bridge.errors import Diverged
from trainer_bridge.policy.policy import ModelConfig, Policy, load_policy
from trainer_bridge.policy.trainer import (
    OptimizerConfig,
    ScoredAnswers,
    Trainer,
    UpdateConfig,
)


def trainer(policy: Policy, *, rate: float = 1.0, **settings: Any) -> Trainer:
    """One whose optimizer is plain gradient descent: with rate 1, a step is the gradient."""
    defaults: dict[str, Any] = {
        "optimizer": OptimizerConfig(max_grad_norm=1e9, learning_rate=rate),
        "update": UpdateConfig(),
        "advantage": AdvantageConfig(),
        "loss": ClipLossConfig(),
        "correction": CorrectionConfig(),
    }
    made = Trainer(policy, **{**defaults, **settings}, max_new_tokens=16)
    weights = [p for p in policy.parameters() if p.requires_grad]
    made.optimizer = torch.optim.SGD(weights, lr=rate)  # type: ignore[assignment]
    return made


@pytest.fixture
def fresh(tiny_model: Path) -> Callable[[], Policy]:
    return lambda: load_policy(ModelConfig(path=str(tiny_model)), "cpu")[0]


def moved(policy: Policy, step: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """How far a step moved each weight."""
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    step()
    return {n: p.detach() - before[n] for n, p in policy.named_parameters()}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    scale = max(w.abs().max().item() for w in want.values())
    assert scale > 0
    for name, weight in want.items():
        assert (got[name] - weight).abs().max() < 1e-4 * scale, name


def by_hand(policy: Policy, scored: ScoredAnswers) -> None:
    """Gradient descent on DAPO's loss with EAD's correction, written out over full logits."""
    total = torch.zeros(())
    count = sum(int(sample.trained.sum()) for sample in scored.samples)
    rewards = torch.tensor(scored.rewards).view(GROUPS, SIZE)
    spread = rewards.std(dim=1, keepdim=True)
    advantages = ((rewards - rewards.mean(dim=1, keepdim=True)) / (spread + 1e-6)).flatten()
    for sample, advantage in zip(scored.samples, advantages, strict=True):
        ids = torch.from_numpy(sample.token_ids)
        first = len(ids) - int(sample.trained.sum())
        logits = policy.model(ids[None]).logits[0, first - 1 : -1]
        log_pi = logits.log_softmax(-1).gather(1, ids[first:, None]).squeeze(1)
        ratio_to_mu = (log_pi.detach() - torch.from_numpy(sample.behaviour_logprobs)).exp()
        total = total - (ratio_to_mu.clamp(max=2.0) * advantage * log_pi).sum() / count
    total.backward()
    with torch.no_grad():
        for weight in policy.parameters():
            weight -= weight.grad
            weight.grad = None


def test_an_update_is_the_gradient_of_the_loss_written_out(fresh: Callable[[], Policy]) -> None:
    ours, theirs = fresh(), fresh()
    scored = answers(ours)
    got = moved(ours, lambda: trainer(ours).update(scored))
    assert_same(got, moved(theirs, lambda: by_hand(theirs, scored)))


@pytest.mark.parametrize(
    ("loss", "correction"),
    [
        (ClipLossConfig(), "tis"),
        (ClipLossConfig(), "annealed"),
        (GspoLossConfig(), "sequence"),
        (CispoLossConfig(aggregation="seq-mean-token-sum-norm"), "icepop"),
        (KlCovLossConfig(covariance_share=0.3), "none"),
        (ClipLossConfig(entropy_coefficient=0.1, selective_entropy_coefficient=0.5), "mis"),
    ],
)
def test_how_a_batch_is_cut_for_the_forward_passes_changes_nothing(
    fresh: Callable[[], Policy], loss: LossConfig, correction: Any
) -> None:
    results = []
    for tokens in (10_000, 30):
        policy = fresh()
        made = trainer(
            policy,
            loss=loss,
            correction=CorrectionConfig(kind=correction),
            update=UpdateConfig(tokens_per_forward=tokens),
        )
        metrics: dict[str, float] = {}
        step = moved(policy, lambda: metrics.update(made.update(answers(policy))))  # noqa: B023
        results.append((step, metrics))
    (whole, told), (parts, told_in_parts) = results
    assert_same(parts, whole)
    assert told_in_parts == pytest.approx(told, rel=1e-4, abs=1e-6)


def test_minibatches_are_steps_against_the_policy_before_the_first(
    fresh: Callable[[], Policy],
) -> None:
    """With one group per minibatch, the second step's ratio is to the first weights, not its own:
    written out with policy_loss's own clipping off, it is r A w."""
    policy = fresh()
    scored = answers(policy)
    free = ClipLossConfig(clip_low=1.0, clip_high=1e9, dual_clip=0)
    made = trainer(policy, rate=0.05, loss=free, update=UpdateConfig(minibatches=GROUPS))
    got = moved(policy, lambda: made.update(scored))
    assert made.updates == GROUPS

    other = fresh()

    def written_out() -> None:
        rewards = torch.tensor(scored.rewards).view(GROUPS, SIZE)
        spread = rewards.std(dim=1, keepdim=True)
        advantages = ((rewards - rewards.mean(dim=1, keepdim=True)) / (spread + 1e-6)).flatten()
        descent = torch.optim.SGD(other.parameters(), lr=0.05)
        for group in range(GROUPS):
            mine = range(group * SIZE, (group + 1) * SIZE)
            count = sum(int(scored.samples[i].trained.sum()) for i in mine)
            for i in mine:
                sample = scored.samples[i]
                ids = torch.from_numpy(sample.token_ids)
                first = len(ids) - int(sample.trained.sum())
                logits = other.model(ids[None]).logits[0, first - 1 : -1]
                log_pi = logits.log_softmax(-1).gather(1, ids[first:, None]).squeeze(1)
                old = torch.from_numpy(sample.model_logprobs)
                weight = (old - torch.from_numpy(sample.behaviour_logprobs)).exp().clamp(max=2.0)
                (-(weight * (log_pi - old).exp() * advantages[i]).sum() / count).backward()
            descent.step()
            descent.zero_grad()

    assert_same(got, moved(other, written_out))


def test_server_and_trainer_agree_on_pi_old_to_rounding(fresh: Callable[[], Policy]) -> None:
    results = []
    for source in ("server", "recompute"):
        policy = fresh()
        update = UpdateConfig(minibatches=2, old_logprobs=source)
        made = trainer(policy, rate=0.05, update=update)
        scored = answers(policy)
        results.append(moved(policy, lambda: made.update(scored)))  # noqa: B023
    assert_same(*results)


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_kl_to_a_reference_pulls_towards_it(fresh: Callable[[], Policy], place: Any) -> None:
    """With rewards that teach nothing (loss), or strong enough a coefficient (reward), the update
    brings the policy nearer to the reference."""
    policy, reference = fresh(), fresh()
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(
                0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            )
    scored = answers(policy)
    same = ScoredAnswers(scored.samples, [1.0] * len(scored.rewards), scored.group_ids)
    loss = ClipLossConfig(
        kl_coefficient=1.0, kl_in=place, kl_estimator="k1" if place == "reward" else "k2"
    )
    made = trainer(policy, rate=1e-4, loss=loss, advantage=AdvantageConfig(kind="dr_grpo"))
    made.reference = reference
    batch = policy.batch(scored.samples)

    def distance() -> float:
        with torch.no_grad():
            gap = policy(batch).logprobs - reference(batch).logprobs
        return gap.square().mean().item()

    before = distance()
    metrics = made.update(same)
    if place == "loss":
        assert distance() < before
    else:
        assert metrics["reward/kl_penalty"] != 0
        assert metrics["optim/grad_norm"] > 0  # equal rewards teach by their penalties alone


def test_an_update_without_finite_gradient_is_skipped_and_counted_then_ends_the_run(
    fresh: Callable[[], Policy],
) -> None:
    policy = fresh()
    made = trainer(policy, update=UpdateConfig(max_skipped=3))
    scored = answers(policy)
    healthy = [p.detach().clone() for p in policy.parameters()]
    hooked = next(policy.parameters())
    handle = hooked.register_hook(lambda gradient: gradient * math.nan)
    for _ in range(2):
        metrics = made.update(scored)
        assert metrics["optim/skipped"] == 1
        assert math.isnan(metrics["optim/grad_norm"])
    for weight, before in zip(policy.parameters(), healthy, strict=True):
        assert torch.equal(weight, before)
    handle.remove()
    assert made.update(scored)["optim/skipped"] == 0  # and the count begins again
    hooked.register_hook(lambda gradient: gradient * math.nan)
    made.update(scored)
    made.update(scored)
    with pytest.raises(Diverged, match="3 updates in a row"):
        made.update(scored)


def test_the_optimizer_is_adamw_written_out() -> None:
    """Warm-up, the bound on the gradient's norm, both moments and the decay, over five updates.

    The gradient of each is what plain descent with rate 1 moves a copy of the model by.
    """
    rate, warmup, (beta1, beta2), decay, bound = 0.02, 3, (0.7, 0.9), 0.4, 1.5
    model, draw = make_model("llama"), random.Random(0)
    made = Trainer(
        Policy(model, torch.float64),
        optimizer=OptimizerConfig(
            learning_rate=rate,
            warmup_updates=warmup,
            betas=(beta1, beta2),
            weight_decay=decay,
            max_grad_norm=bound,
        ),
        update=UpdateConfig(),
        advantage=AdvantageConfig(),
        loss=ClipLossConfig(),
        correction=CorrectionConfig(),
        max_new_tokens=16,
    )
    weights = dict(made.policy.named_parameters())
    want = {name: weight.detach().clone() for name, weight in weights.items()}
    first = {name: torch.zeros_like(weight) for name, weight in want.items()}
    second = {name: torch.zeros_like(weight) for name, weight in want.items()}
    norms = []
    for number in range(1, 6):
        scored, _ = sampled(model, draw)
        twin = Policy(copy.deepcopy(model), torch.float64)
        step = trainer(twin)
        descent = moved(twin, lambda: step.update(scored))  # noqa: B023
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in descent.values())))
        metrics = made.update(scored)
        warm = rate * min(1.0, number / warmup)
        assert metrics["optim/grad_norm"] == pytest.approx(norms[-1])
        assert metrics["optim/learning_rate"] == pytest.approx(warm)
        for name, weight in weights.items():
            gradient = -descent[name] * min(1.0, bound / norms[-1])
            first[name] = beta1 * first[name] + (1 - beta1) * gradient
            second[name] = beta2 * second[name] + (1 - beta2) * gradient**2
            mean = first[name] / (1 - beta1**number)
            square = second[name] / (1 - beta2**number)
            want[name] *= 1 - warm * decay
            want[name] -= warm * mean / (square.sqrt() + 1e-8)
            assert (weight - want[name]).abs().max() < 1e-4 * warm, name
    assert min(norms) < bound < max(norms)  # some are cut, and some are not


# --- several processes ---------------------------------------------------------------------------


def _rank(rank: int, port: int, model: str, loss: LossConfig, out: str) -> None:
    """One of two gloo processes: two updates, and what they did."""
    from trainer_bridge.policy import ranks

    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    ranks.join()
    policy, _ = load_policy(ModelConfig(path=model), "cpu")
    scored = [answers(policy, seed) for seed in range(2)]
    policy.shard()
    torch.manual_seed(0)
    made = Trainer(
        policy,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        update=UpdateConfig(tokens_per_forward=40, minibatches=2),
        advantage=AdvantageConfig(),
        loss=loss,
        correction=CorrectionConfig(),
        max_new_tokens=16,
    )
    metrics = [made.update(batch) for batch in scored]
    weights = dict(policy.named_weights())
    if rank == 0:
        torch.save((metrics, weights), out)
    ranks.leave()


@pytest.mark.parametrize(
    "loss", [ClipLossConfig(), ClipCovLossConfig(selective_entropy_coefficient=0.1)]
)
def test_two_sharded_processes_do_what_one_does(
    tiny_model: Path, tmp_path: Path, loss: LossConfig
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path / "out.pt"
    torch.multiprocessing.spawn(_rank, (port, str(tiny_model), loss, str(out)), nprocs=2)
    metrics, weights = torch.load(out)

    policy, _ = load_policy(ModelConfig(path=str(tiny_model)), "cpu")
    scored = [answers(policy, seed) for seed in range(2)]
    torch.manual_seed(0)
    made = Trainer(
        policy,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        update=UpdateConfig(tokens_per_forward=40, minibatches=2),
        advantage=AdvantageConfig(),
        loss=loss,
        correction=CorrectionConfig(),
        max_new_tokens=16,
    )
    alone = [made.update(batch) for batch in scored]
    for got, want in zip(metrics, alone, strict=True):
        assert got == pytest.approx(want, rel=2e-3, abs=1e-4)
    for name, weight in policy.named_weights():
        assert (weights[name] - weight).abs().max() < 2e-4, name
