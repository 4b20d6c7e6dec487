"""One update of the policy from one batch of scored answers.

Legend: A = answers, N = trained tokens of the batch, packed answer after answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer_bridge.algorithms.advantages import AdvantageConfig, advantages, groups_with_signal
from trainer_bridge.algorithms.corrections import (
    CorrectionConfig,
    correction_metrics,
    correction_weights,
)
from trainer_bridge.algorithms.loss_config import LossConfig
from trainer_bridge.algorithms.losses import (
    aggregation_weights,
    covariance_tokens,
    kl_penalties,
    peak_entropy,
    policy_loss,
    regularisation,
    selective_entropy_loss,
)
from trainer_bridge.errors import Diverged
from trainer_bridge.policy import ranks
from trainer_bridge.policy.batch import RolloutBatch, Sample
from trainer_bridge.policy.policy import Policy
from trainer_bridge.settings import Settings


class OptimizerConfig(Settings):
    """AdamW (arXiv 1711.05101)."""

    learning_rate: float = Field(1e-6, gt=0)
    warmup_updates: int = Field(0, ge=0, description="over which the rate rises linearly")
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)


class UpdateConfig(Settings):
    """How a batch becomes an update."""

    minibatches: int = Field(
        1, ge=1, description="optimizer steps made of one batch; groups stay whole"
    )
    tokens_per_forward: int = Field(
        8192, ge=1, description="gradients are accumulated over parts of at most so many tokens"
    )
    old_logprobs: Literal["recompute", "server"] = Field(
        "recompute",
        description="pi_old: the trainer's own before its first step on the batch, or what the "
        "server recorded, which saves a forward pass where one would be needed",
    )
    max_skipped: int = Field(
        3, ge=1, description="updates in a row without finite gradient that end the run"
    )


@dataclass(frozen=True)
class ScoredAnswers:
    """What an update is made of, group after group."""

    samples: Sequence[Sample]  # A of them
    rewards: Sequence[float]  # [A]
    group_ids: Sequence[int]  # [A], equal for answers to the same prompt
    behind: Sequence[int] = ()  # [A], updates since an answer's oldest token; empty: all 0


@dataclass(frozen=True)
class _Before:
    """What is known of each token before the first step on a batch: float [N] or None."""

    logprobs: Tensor | None = None  # log pi_old, at the temperature at which the policy is trained
    entropies: Tensor | None = None
    reference: Tensor | None = None  # log-probabilities, at the temperature of `logprobs`


class Trainer:
    """Policy and optimizer. The policy is trained in place; with `torchrun`, every rank has a
    Trainer, and all call `update` with the same answers.

    max_new_tokens: of an answer, which normalises the aggregation seq-mean-token-sum-norm.
    reference: the policy to stay close to, where `loss.kl_coefficient` is not 0; without one, a
    policy with adapters is held to itself without them.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        optimizer: OptimizerConfig,
        update: UpdateConfig,
        advantage: AdvantageConfig,
        loss: LossConfig,
        correction: CorrectionConfig,
        max_new_tokens: int,
        reference: Policy | None = None,
    ) -> None:
        self.policy = policy
        self.reference = reference
        self.max_new_tokens = max_new_tokens
        self.optimizer_config = optimizer
        self.config = update
        self.advantage = advantage
        self.loss = loss
        self.correction = correction
        self.optimizer = torch.optim.AdamW(
            [weight for weight in policy.parameters() if weight.requires_grad],
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
        )
        self.updates = 0  # optimizer steps made or skipped
        self.skipped = 0  # of the last ones in a row
        self.entropy_anchor: float | None = None  # nats; SIREN's, from the first update

    def update(self, answers: ScoredAnswers) -> dict[str, float]:
        """Train on one batch; its statistics by name, over all ranks.

        An update whose gradient is not finite is skipped and counted. Raises Diverged when that
        goes on, ValueError for a reward that is not finite.
        """
        batch = self.policy.batch(answers.samples)
        rewards = torch.tensor(answers.rewards, dtype=torch.float32)
        group_ids = torch.tensor(answers.group_ids)
        before = self._before_update(batch)
        metrics = {
            "reward/mean": rewards.mean().item(),
            "reward/std": rewards.std(correction=0).item(),
            "reward/share_with_signal": groups_with_signal(rewards, group_ids)
            .float()
            .mean()
            .item(),
            "policy/temperature": batch.temperatures.mean().item(),
            "tokens/trained": float(batch.num_tokens),
        }
        if self.loss.kl_coefficient and self.loss.kl_in == "reward":
            assert before.logprobs is not None
            assert before.reference is not None
            penalties = kl_penalties(
                before.logprobs, before.reference, batch.sequence_ids, self.loss
            )
            rewards = rewards - penalties.cpu()
            metrics["reward/kl_penalty"] = penalties.mean().item()
        advantage = advantages(rewards, group_ids, self.advantage).to(self.policy.device)

        tokens: list[dict[str, Tensor]] = []
        norms: list[float] = []
        for start, stop in _minibatches(answers.group_ids, self.config.minibatches):
            own = batch.token_slice(start, stop)
            seen, norm = self._step(
                batch.select(start, stop),
                advantage[start:stop],
                _Before(*(x if x is None else x[own] for x in vars(before).values())),
            )
            tokens.append({**seen, "sequence_ids": seen["sequence_ids"] + start})
            norms.append(norm)
        metrics["optim/grad_norm"] = sum(norms) / len(norms)
        metrics["optim/skipped"] = float(sum(not math.isfinite(norm) for norm in norms))
        metrics["optim/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        stale = torch.tensor(answers.behind or [0] * len(answers.samples)) > 0
        return {**metrics, **self._statistics(tokens, stale)}

    # --- before the first step ------------------------------------------------------------------

    @property
    def _tempered(self) -> bool:
        return self.correction.trained_policy == "tempered"

    @property
    def _column(self) -> Literal["tempered", "logprobs"]:
        """The one of TokenLogprobs that is of the policy that is trained."""
        return "tempered" if self._tempered else "logprobs"

    def _server_logprobs(self, batch: RolloutBatch) -> Tensor:
        """What the server said of the policy that is trained."""
        return batch.behaviour_logprobs if self._tempered else batch.model_logprobs

    @torch.no_grad()
    def _before_update(self, batch: RolloutBatch) -> _Before:
        """Forward passes over the whole batch, as few as the settings need.

        None where one step on the batch takes its own log-probabilities for pi_old.
        """
        loss = self.loss
        needs_logprobs = (
            self.config.minibatches > 1
            or loss.kind in ("clip_cov", "kl_cov")
            or (loss.kl_coefficient > 0 and loss.kl_in == "reward")
        )
        from_server = self.config.old_logprobs == "server"
        logprobs = self._server_logprobs(batch) if from_server else None
        entropies = reference = None
        if loss.selective_entropy_coefficient or (needs_logprobs and not from_server):
            columns = self._whole_batch(batch, self.policy)
            entropies = columns["entropies"]
            if not from_server:
                logprobs = columns[self._column]
        if loss.kl_coefficient:
            with self.policy.without_adapters():
                reference = self._whole_batch(batch, self.reference or self.policy)[self._column]
        return _Before(logprobs, entropies, reference)

    def _whole_batch(self, batch: RolloutBatch, policy: Policy) -> dict[str, Tensor]:
        """TokenLogprobs of the whole batch on every rank, each rank computing its share."""
        seen: list[dict[str, Tensor]] = []
        for start, stop, counts in _micro_batches_of_rank(batch, self.config.tokens_per_forward):
            result = policy(batch.select(start, stop), tempered=self._tempered)
            if counts:
                seen.append({"start": torch.tensor([start]), **result._asdict()})
        return {
            name: column.to(batch.targets.device) for name, column in _from_all_ranks(seen).items()
        }

    # --- one optimizer step ---------------------------------------------------------------------

    def _step(
        self, batch: RolloutBatch, advantage: Tensor, before: _Before
    ) -> tuple[dict[str, Tensor], float]:
        """Statistics of every token, on the CPU, and the norm of the gradient.

        advantage: float [A] of this batch's answers.
        """
        weights = aggregation_weights(
            batch.sequence_ids, self.loss.aggregation, max_tokens=self.max_new_tokens
        )
        per_token = advantage[batch.sequence_ids]
        selected = None
        if before.logprobs is not None:
            selected = covariance_tokens(before.logprobs, per_token, self.loss)
        if before.entropies is not None and self.entropy_anchor is None:
            quantile = self.loss.selective_entropy_quantile
            self.entropy_anchor = peak_entropy(before.entropies, quantile)[0].item()
        seen: list[dict[str, Tensor]] = []
        for start, stop, counts in _micro_batches_of_rank(batch, self.config.tokens_per_forward):
            part, own = batch.select(start, stop), batch.token_slice(start, stop)
            result = self.policy(part, tempered=self._tempered)
            log_pi = getattr(result, self._column)
            old = log_pi.detach() if before.logprobs is None else before.logprobs[own]
            loss, clipped = policy_loss(
                log_pi,
                old,
                per_token[own],
                part.sequence_ids,
                self.loss,
                selected=None if selected is None else selected[own],
            )
            correction = correction_weights(
                old, part.behaviour_logprobs, part.sequence_ids, self.correction
            )
            reference = None if before.reference is None else before.reference[own]
            regular = regularisation(log_pi, result.entropies, self.loss, reference)
            per_token_loss = weights[own] * correction * (loss + regular)
            total = per_token_loss.sum()
            if before.entropies is not None and self.entropy_anchor is not None:
                total = total + selective_entropy_loss(
                    result.entropies, self.entropy_anchor, self.loss, batch=before.entropies
                )
            # FSDP averages gradients over ranks; a part computed only to keep in step counts 0
            (total * ranks.world_size() * counts).backward()
            if counts:
                seen.append(
                    {
                        "start": torch.tensor([start]),
                        "loss": per_token_loss.detach(),
                        "clipped": clipped,
                        "old": old,
                        "now": log_pi.detach(),
                        "entropies": result.entropies.detach(),
                        "behaviour": part.behaviour_logprobs,
                        "server": self._server_logprobs(part),
                        "sequence_ids": part.sequence_ids + start,
                    }
                )
        return _from_all_ranks(seen), self._optimize()

    def _optimize(self) -> float:
        """The optimizer's step, unless the gradient is not finite. Returns the gradient's norm."""
        config = self.optimizer_config
        whole = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), config.max_grad_norm)
        norm = float(whole.full_tensor() if hasattr(whole, "full_tensor") else whole)
        self.updates += 1
        warm = min(1.0, self.updates / max(1, config.warmup_updates))
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * warm
        if math.isfinite(norm):
            self.optimizer.step()
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.skipped >= self.config.max_skipped:
            raise Diverged(f"{self.skipped} updates in a row had no finite gradient ({norm})")
        return norm

    # --- what is told ---------------------------------------------------------------------------

    def _statistics(self, steps: list[dict[str, Tensor]], stale: Tensor) -> dict[str, float]:
        """Over all tokens. `mismatch`: between trainer and server, before the first step, where
        both have the same weights; `drift`: where updates lie between. stale: bool [A]."""
        tokens = {name: torch.cat([step[name] for step in steps]) for name in steps[0]}
        correction = correction_metrics(
            tokens["old"],
            tokens["behaviour"],
            tokens["sequence_ids"],
            self.correction,
            entropies=tokens["entropies"],
        )
        return {
            "loss/total": tokens["loss"].sum().item() / len(steps),
            "loss/clip_fraction": tokens["clipped"].float().mean().item(),
            "policy/entropy": tokens["entropies"].mean().item(),
            **_gaps(steps[0], stale),
            **{f"correction/{name}": value for name, value in correction.items()},
        }


def _gaps(first: dict[str, Tensor], stale: Tensor) -> dict[str, float]:
    """Mean |log-probability of the trainer - of the server|, nats; absent without such tokens."""
    gaps = (first["now"] - first["server"]).abs()
    drifted = stale[first["sequence_ids"]]
    named = {"policy/mismatch": gaps[~drifted], "policy/drift": gaps[drifted]}
    return {name: some.mean().item() for name, some in named.items() if len(some)}


def _minibatches(group_ids: Sequence[int], count: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of `count` runs of whole groups, of about as many answers each; fewer when
    there are fewer groups."""
    firsts = [i for i, group in enumerate(group_ids) if i == 0 or group != group_ids[i - 1]]
    count = min(count, len(firsts))
    edges = [firsts[len(firsts) * number // count] for number in range(count)]
    yield from zip(edges, [*edges[1:], len(group_ids)], strict=True)


def _micro_batches_of_rank(batch: RolloutBatch, max_tokens: int) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, counts) of the parts that this rank computes.

    All ranks compute equally many, since each forward pass gathers the weights from all of them;
    the last part is computed again where there is none left, and does not count.
    """
    parts = list(batch.micro_batches(max_tokens))
    for first in range(0, len(parts), ranks.world_size()):
        mine = first + ranks.rank()
        start, stop = parts[min(mine, len(parts) - 1)]
        yield start, stop, mine < len(parts)


def _from_all_ranks(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The columns of all parts on all ranks, in the order of their `start`, on the CPU."""
    local = [{name: column.cpu() for name, column in part.items()} for part in parts]
    everyone = [part for rank in ranks.gather(local) for part in rank]
    everyone.sort(key=lambda part: int(part["start"]))
    return {
        name: torch.cat([part[name] for part in everyone])
        for name in everyone[0]
        if name != "start"
    }
