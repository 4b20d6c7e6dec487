"""The GRPO loop against one server: rollout, score, update, publish."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from ead_client import Choice, Client, EadError, Rollout
from trainer_bridge.batch import RolloutBatch
from trainer_bridge.losses import GrpoLoss, LossMetrics, group_advantages, grpo_loss
from trainer_bridge.policy import token_logprobs
from trainer_bridge.weights import WeightPublisher


class StaleRollout(EadError):
    """A rollout was sampled from other weights than the trainer's current ones."""


ProblemT = TypeVar("ProblemT", bound="Problem")


class Problem(Protocol):
    """Something to solve, asked as a chat."""

    @property
    def messages(self) -> Sequence[Mapping[str, str]]: ...


class Task(Protocol[ProblemT]):
    """Problems and their exact verifier."""

    def problems(self, count: int, seed: int) -> list[ProblemT]: ...

    def reward(self, problem: ProblemT, answer: str) -> float: ...


@dataclass(frozen=True)
class GrpoConfig:
    """Settings of a run. What is trained is the policy at temperature 1."""

    prompts_per_step: int = 8  # P
    samples_per_prompt: int = 8  # G
    max_new_tokens: int = 32
    annealing: Mapping[str, Any] = field(default_factory=dict)  # the step is filled in
    learning_rate: float = 1e-6
    max_grad_norm: float = 1.0
    answers_per_forward: int = 16  # gradients are accumulated over these
    loss: GrpoLoss = field(default_factory=GrpoLoss)
    seed: int = 0


@dataclass(frozen=True)
class StepReport:
    """What one step did. Means over its answers, or over its generated tokens."""

    step: int
    reward: float  # mean over answers
    groups_with_signal: float  # share of groups whose rewards differ
    answer_length: float  # tokens
    temperature: float  # mean tau over tokens
    entropy: float  # mean entropy of pi over tokens, nats
    mismatch: float  # mean |trainer's log pi - server's log pi| over tokens, nats
    loss: LossMetrics
    grad_norm: float
    rollout_version: str  # weights that the answers were sampled from
    weight_version: str  # weights served after the step
    seconds: Mapping[str, float]  # by phase
    rollouts: Sequence[Rollout] = field(repr=False, default=())


class GrpoTrainer:
    """Holds policy, optimizer and server together; one call of `step` is one update.

    policy: Hugging Face causal LM, trained in place. The optimizer is AdamW without weight decay.
    """

    def __init__(
        self,
        config: GrpoConfig,
        policy: Any,
        tokenizer: Any,
        task: Task[Any],
        client: Client,
        publisher: WeightPublisher,
    ) -> None:
        self.config = config
        self.policy = policy
        self.tokenizer = tokenizer
        self.task = task
        self.client = client
        self.publisher = publisher
        self.device = next(policy.parameters()).device
        self.optimizer = torch.optim.AdamW(
            policy.parameters(), lr=config.learning_rate, weight_decay=0.0
        )
        self.weight_version = str(client.model_info()["weight_version"])

    def step(self, step: int, progress: Callable[[str], None] = lambda phase: None) -> StepReport:
        """One update. progress: called with the name of each phase as it begins.

        Raises StaleRollout when the server answers with other weights than were published.
        """
        clock = _Clock(progress)
        problems = self.task.problems(self.config.prompts_per_step, self.config.seed + step)
        with clock.phase("rollout"):
            choices = self.rollout(problems, step)
        with clock.phase("score"):
            rewards = self.score(problems, choices)
        rollouts = [choice.rollout for choice in choices if choice.rollout is not None]
        versions = {rollout.weight_version for rollout in rollouts}
        if versions != {self.weight_version}:
            raise StaleRollout(f"expected version {self.weight_version}, answers say {versions}")
        batch = RolloutBatch.build(
            rollouts, pad_token_id=self.tokenizer.pad_token_id or 0, device=self.device
        )
        with clock.phase("update"):
            loss, grad_norm, entropy, mismatch = self.update(batch, group_advantages(rewards))
        rollout_version = self.weight_version
        with clock.phase("publish"):
            self.publisher.publish(self.policy, step + 1)
            self.weight_version = str(step + 1)
        return StepReport(
            step=step,
            reward=rewards.mean().item(),
            groups_with_signal=(rewards.std(dim=1) > 0).float().mean().item(),
            answer_length=len(batch.sequence_ids) / len(batch),
            temperature=batch.temperatures.mean().item(),
            entropy=entropy,
            mismatch=mismatch,
            loss=loss,
            grad_norm=grad_norm,
            rollout_version=rollout_version,
            weight_version=self.weight_version,
            seconds=clock.seconds,
            rollouts=rollouts,
        )

    def rollout(self, problems: Sequence[Problem], step: int) -> list[Choice]:
        """G annealed answers to each problem, in order: [P * G]."""
        prompts = [
            self.tokenizer.apply_chat_template(
                list(problem.messages),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
            for problem in problems
        ]
        return self.client.complete(
            prompts,
            annealing={**self.config.annealing, "step": step},
            n=self.config.samples_per_prompt,
            max_tokens=self.config.max_new_tokens,
            top_p=1.0,
        ).choices

    def score(self, problems: Sequence[Problem], choices: Sequence[Choice]) -> torch.Tensor:
        """The task's rewards: float32 [P, G]."""
        group = self.config.samples_per_prompt
        rewards = [
            self.task.reward(problems[index // group], choice.text)
            for index, choice in enumerate(choices)
        ]
        return torch.tensor(rewards, dtype=torch.float32).view(len(problems), group)

    def update(
        self, batch: RolloutBatch, advantages: torch.Tensor
    ) -> tuple[LossMetrics, float, float, float]:
        """One AdamW step on the whole batch, its gradient accumulated over micro-batches.

        advantages: float [P, G]. pi_old is the policy as it stands, since the batch is used for
        one step only. Returns loss statistics, gradient norm, mean entropy, mean mismatch.
        """
        self.policy.train()
        advantages = advantages.flatten().to(self.device)
        logprobs: list[torch.Tensor] = []
        entropies: list[torch.Tensor] = []
        size = self.config.answers_per_forward
        for start in range(0, len(batch), size):
            part = batch.rows(start, start + size)
            log_pi, entropy = token_logprobs(self.policy, part)
            loss, _ = grpo_loss(
                log_pi,
                log_pi.detach(),
                part.behaviour_logprobs,
                advantages[start : start + size][part.sequence_ids],
                part.sequence_ids,
                self.config.loss,
            )
            (loss * self._share(part, batch)).backward()
            logprobs.append(log_pi.detach())
            entropies.append(entropy)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        whole = torch.cat(logprobs)
        _, metrics = grpo_loss(
            whole,
            whole,
            batch.behaviour_logprobs,
            advantages[batch.sequence_ids],
            batch.sequence_ids,
            self.config.loss,
        )
        mismatch = (whole - batch.model_logprobs).abs().mean().item()
        return metrics, norm.item(), torch.cat(entropies).mean().item(), mismatch

    def _share(self, part: RolloutBatch, batch: RolloutBatch) -> float:
        """The part's share of the batch's mean, so that accumulating changes nothing."""
        if self.config.loss.aggregation == "token-mean":
            return len(part.sequence_ids) / len(batch.sequence_ids)
        return len(part) / len(batch)


class _Clock:
    """Seconds by phase."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def phase(self, name: str) -> Any:
        self._progress(name)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
