"""Every way of making an update, crossed, against the same update written out token by token.

The other side is float64, over full logits and one answer at a time, and shares no code with the
trainer: losses, corrections, KL, aggregation and advantages are written down here again.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from typing import Any

import pytest
import torch
from helpers.small_models import (
    LONGEST,
    RATE,
    chosen,
    make_model,
    rows_of,
    sampled,
)
from pydantic import TypeAdapter
from torch import Tensor

from trainer_bridge.algorithms.advantages import AdvantageConfig
from trainer_bridge.algorithms.corrections import CorrectionConfig
from trainer_bridge.algorithms.loss_config import LossConfig
from trainer_bridge.policy.policy import Policy
from trainer_bridge.policy.trainer import OptimizerConfig, Trainer, UpdateConfig

KINDS = ("clip", "cispo", "gspo", "clip_cov", "kl_cov")
SELECTION = {
    # every token in the range, so that nothing is drawn
    "clip_cov": {"covariance_share": 1.0, "covariance_low": 0.1},
    "kl_cov": {"covariance_share": 0.1},
}
CORRECTIONS = ("none", "tis", "mis", "icepop", "sequence", "annealed")
OLD = ("recompute", "server")
KL: tuple[dict[str, Any], ...] = (
    {},
    *({"kl_in": "loss", "kl_estimator": kind} for kind in ("k2", "k3")),
    *({"kl_in": "reward", "kl_estimator": kind} for kind in ("k1", "k2", "k3")),
)
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")
MODELS = ("llama", "head bias", "logits scaled", "soft cap")


def moved(model: Any, by: float, seed: int) -> Any:
    """A copy with other weights."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(by * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return other


# --- the update, written out ---------------------------------------------------------------------


class WrittenOut:
    """Plain gradient descent on one batch."""

    def __init__(self, model: Any, reference: Any, cell: dict[str, Any]) -> None:
        self.model, self.reference, self.cell = model, reference, cell

    def logprobs(self, model: Any, answer: tuple[Any, ...], rows: Tensor | None = None) -> Tensor:
        prompt, tokens, tau, *_ = answer
        rows = rows_of(model, prompt, tokens) if rows is None else rows
        return chosen(rows / tau[:, None] if self.tempered else rows, tokens)

    @property
    def tempered(self) -> bool:
        return bool(self.cell["correction"] == "annealed")

    def kl(self, log_pi: Tensor, log_ref: Tensor) -> Tensor:
        d = log_pi - log_ref
        return {"k1": d, "k2": d * d / 2, "k3": (-d).exp() - 1 + d}[self.cell["kl"]["kl_estimator"]]

    def run(self, answers: list[tuple[Any, ...]], rewards: list[float], beta: float) -> None:
        cell, count = self.cell, len(answers)
        with torch.no_grad():
            old = [self.logprobs(self.model, answer) for answer in answers]
            if cell["old"] == "server":
                old = [mu if self.tempered else pi for _, _, _, mu, pi in answers]
            ref = [self.logprobs(self.reference, answer) for answer in answers]
            if cell["kl"].get("kl_in") == "reward":
                for index in range(count):
                    before = self.logprobs(self.model, answers[index])
                    before = old[index] if cell["old"] == "server" else before
                    penalty = float(beta * self.kl(before, ref[index]).sum())
                    rewards = [r - penalty * (i == index) for i, r in enumerate(rewards)]
        advantages = []
        for first in range(0, count, 3):
            group = rewards[first : first + 3]
            mean = sum(group) / 3
            spread = math.sqrt(sum((r - mean) ** 2 for r in group) / 2)
            advantages += [(r - mean) / (spread + 1e-6) for r in group]
        cuts = [0, 3, 9] if cell["minibatches"] == 2 else [0, 9]
        for start, stop in itertools.pairwise(cuts):
            self.model.zero_grad()
            self.loss(
                answers[start:stop], old[start:stop], ref[start:stop], advantages[start:stop], beta
            ).backward()
            with torch.no_grad():
                for weight in self.model.parameters():
                    if weight.grad is not None:
                        weight -= RATE * weight.grad

    def loss(
        self, answers: Any, old: Any, ref: Any, advantages: list[float], beta: float
    ) -> Tensor:
        cell = self.cell
        lengths = [len(tokens) for _, tokens, *_ in answers]
        chosen_tokens = self.selected(old, advantages)
        total = torch.zeros((), dtype=torch.float64)
        for index, answer in enumerate(answers):
            rows = rows_of(self.model, answer[0], answer[1])
            log_pi = self.logprobs(self.model, answer, rows)
            weights = self.weights(old[index], answer[3])
            mean_ratio = (log_pi.detach() - old[index]).mean().exp()
            entropies = -(rows.softmax(-1) * rows.log_softmax(-1)).sum(-1)
            for t in range(lengths[index]):
                term = self.term(
                    log_pi[t], old[index][t], advantages[index], mean_ratio, chosen_tokens[index][t]
                )
                if cell["kl"].get("kl_in") == "loss":
                    term = term + beta * self.kl(log_pi[t], ref[index][t])
                term = term - cell["entropy"] * entropies[t]
                share = {
                    "token-mean": 1 / sum(lengths),
                    "seq-mean-token-mean": 1 / (len(answers) * lengths[index]),
                    "seq-mean-token-sum-norm": 1 / (len(answers) * LONGEST),
                }[cell["aggregation"]]
                total = total + share * weights[t] * term
        return total

    def term(self, log_pi: Tensor, old: Tensor, a: float, mean_ratio: Tensor, own: bool) -> Tensor:
        kind = self.cell["loss"]
        r = (log_pi - old).exp()
        if kind == "cispo":
            return -min(r.item(), 5.0) * a * log_pi
        if kind == "gspo":
            r = mean_ratio * (log_pi - log_pi.detach()).exp()
        low, high = (1 - 3e-4, 1 + 4e-4) if kind == "gspo" else (0.8, 1.28)
        if kind == "kl_cov":
            return -r * a + (log_pi - old).abs() * own
        if kind == "clip_cov" and own:
            return 0 * log_pi
        bounded = torch.minimum(torch.maximum(r, torch.tensor(low)), torch.tensor(high))
        surrogate = min(r * a, bounded * a, key=Tensor.item)
        if kind == "clip" and a < 0 and surrogate.item() < 3 * a:
            surrogate = torch.tensor(3 * a, dtype=torch.float64) + 0 * log_pi
        return -surrogate

    def weights(self, old: Tensor, log_mu: Tensor) -> list[float]:
        kind = self.cell["correction"]
        ratios = [math.exp(x) for x in (old - log_mu).tolist()]
        if kind == "tis":
            return [min(r, 2.0) for r in ratios]
        if kind == "mis":
            return [r if r <= 2.0 else 0.0 for r in ratios]
        if kind == "icepop":
            return [r if 0.5 <= r <= 5.0 else 0.0 for r in ratios]
        if kind == "sequence":
            return [min(math.prod(ratios), 2.0)] * len(ratios)
        return [1.0] * len(ratios)

    def selected(self, old: list[Tensor], advantages: list[float]) -> list[list[bool]]:
        """Of clip_cov all tokens with a covariance in the range, of kl_cov the highest tenth."""
        flat = torch.cat(old)
        a = torch.cat([torch.full_like(x, y) for x, y in zip(old, advantages, strict=True)])
        covariances = ((flat - flat.mean()) * (a - a.mean())).tolist()
        if self.cell["loss"] == "clip_cov":
            flags = [0.1 < c < 5.0 for c in covariances]
        else:
            highest = sorted(covariances)[-max(1, int(0.1 * len(covariances))) :]
            flags = [self.cell["loss"] == "kl_cov" and c >= highest[0] for c in covariances]
        lengths = iter(flags)
        return [[next(lengths) for _ in range(len(x))] for x in old]


# --- the crossing --------------------------------------------------------------------------------


def cells() -> list[dict[str, Any]]:
    """Loss x correction x old log-probabilities x minibatches in full; the rest drawn for each."""
    found = []
    crossed = itertools.product(KINDS, CORRECTIONS, OLD, (1, 2))
    for loss, correction, old, minibatches in crossed:
        draw = random.Random(f"{loss} {correction} {old} {minibatches}")
        found.append(
            {
                "loss": loss,
                "correction": correction,
                "old": old,
                "minibatches": minibatches,
                "kl": draw.choice(KL),
                "aggregation": draw.choice(AGGREGATIONS),
                "entropy": draw.choice((0.0, 0.1)),
                "stale": draw.random() < 0.5,
                "model": draw.choice(MODELS),
                "shared": draw.random() < 0.5,
                "tokens_per_forward": draw.choice((20, 1000)),
            }
        )
    return found


@pytest.mark.parametrize("cell", cells(), ids=lambda cell: " ".join(map(str, cell.values())))
def test_an_update_is_the_one_that_is_written_out(cell: dict[str, Any]) -> None:
    draw = random.Random(str(cell))
    server = make_model(cell["model"])
    start = moved(server, 0.03, 1) if cell["stale"] else copy.deepcopy(server)
    reference = moved(server, 0.05, 2)
    answers, plain = sampled(server, draw)

    beta = 0.3
    ours = copy.deepcopy(start)
    trainer = Trainer(
        Policy(ours, torch.float64, share_prompts=cell["shared"]),
        optimizer=OptimizerConfig(learning_rate=RATE, max_grad_norm=1e9),
        update=UpdateConfig(
            minibatches=cell["minibatches"],
            tokens_per_forward=cell["tokens_per_forward"],
            old_logprobs=cell["old"],
        ),
        advantage=AdvantageConfig(),
        loss=TypeAdapter[LossConfig](LossConfig).validate_python(
            {
                "kind": cell["loss"],
                "aggregation": cell["aggregation"],
                "entropy_coefficient": cell["entropy"],
                "kl_coefficient": beta if cell["kl"] else 0.0,
                **SELECTION.get(cell["loss"], {}),
                **cell["kl"],
            }
        ),
        correction=CorrectionConfig(kind=cell["correction"]),
        max_new_tokens=LONGEST,
        reference=Policy(reference, torch.float64),
    )
    trainer.optimizer = torch.optim.SGD(ours.parameters(), lr=RATE)  # type: ignore[assignment]
    trainer.update(answers)

    theirs = copy.deepcopy(start)
    WrittenOut(theirs, reference, cell).run(plain, list(answers.rewards), beta)
    first = dict(start.named_parameters())
    got = {name: weight.detach() - first[name] for name, weight in ours.named_parameters()}
    want = {name: weight.detach() - first[name] for name, weight in theirs.named_parameters()}
    scale = max(step.abs().max().item() for step in want.values())
    assert scale > 1e-4
    for name, step in want.items():
        assert (got[name] - step).abs().max() < 1e-4 * scale, name
