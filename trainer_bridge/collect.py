"""Answers for one step: asked of the server, scored as their groups complete, and put in order."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, Field

from ead_client import Choice, Client, Group, RequestRefused, Rollout
from trainer_bridge.advantages import overlong_penalty
from trainer_bridge.batch import Sample
from trainer_bridge.errors import StaleRollout, TooFewRollouts
from trainer_bridge.reward_runner import RewardRunner
from trainer_bridge.rewards import Outcome, RewardFailure
from trainer_bridge.settings import Settings
from trainer_bridge.tasks import Task
from trainer_bridge.trainer import ScoredAnswers
from trainer_bridge.versions import Versions


def _further(sampling: dict[str, Any]) -> dict[str, Any]:
    """Not those that have a setting of their own."""
    for name, setting in _OWN_SETTINGS.items():
        if name in sampling:
            raise ValueError(f"{name} is set by {setting}")
    return sampling


_OWN_SETTINGS = {
    "n": "rollout.samples_per_prompt",
    "max_new_tokens": "rollout.max_new_tokens",
    "annealing": "rollout.annealing",
    **dict.fromkeys(("prompts", "entropies", "texts", "idempotency_key"), "the run itself"),
}


class RolloutConfig(Settings):
    """What is asked of the server for each step."""

    prompts_per_step: int = Field(8, ge=1)
    samples_per_prompt: int = Field(8, ge=2, description="answers in a group")
    max_new_tokens: int = Field(256, ge=1)
    annealing: dict[str, Any] = Field(
        {}, description='the schedule, its step filled in; {"schedule": "constant"}: temperature 1'
    )
    sampling: Annotated[dict[str, Any], AfterValidator(_further)] = Field(
        {}, description="further sampling parameters of SGLang"
    )
    staleness: int = Field(
        0,
        ge=0,
        le=8,
        description="updates that weights may be behind while others are made; "
        "0: strictly on policy, nothing is generated during an update",
    )
    refills: int = Field(
        0,
        ge=0,
        description="rounds of further problems in place of groups without signal, whose "
        "rewards are all equal (dynamic sampling); 0: they are kept, and teach nothing",
    )
    overlong_buffer: int = Field(
        0, ge=0, description="last tokens over which an answer loses reward (DAPO); 0: none"
    )
    overlong_factor: float = Field(1.0, ge=0, description="reward lost at max_new_tokens")
    seeded: bool = Field(
        False,
        description="every answer gets a seed of its own, so that a run can be repeated; "
        "where the server honours seeds",
    )


@dataclass(frozen=True)
class Answer:
    """One answer on its way: its turns (several if it was aborted and continued), and its end."""

    turns: tuple[Rollout, ...]
    text: str

    @property
    def length(self) -> int:
        """Generated tokens."""
        return sum(len(turn) for turn in self.turns)


@dataclass(frozen=True)
class Collected:
    """What one step is trained on, and where the next one's problems begin."""

    answers: ScoredAnswers
    position: int
    metrics: dict[str, float]
    texts: tuple[str, ...] = field(repr=False)

    def told(self) -> Iterator[dict[str, Any]]:
        """The answers as a reader wants them."""
        for sample, reward, group, text in zip(
            self.answers.samples,
            self.answers.rewards,
            self.answers.group_ids,
            self.texts,
            strict=True,
        ):
            temperatures = [round(float(tau), 4) for tau in sample.temperatures]
            yield {"problem": group, "reward": reward, "text": text, "temperatures": temperatures}


class Collector:
    """Asks, scores and orders; knows nothing of the policy but the server that serves it."""

    def __init__(
        self,
        config: RolloutConfig,
        client: Client,
        task: Task,
        runner: RewardRunner,
        tokenizer: Any,
        versions: Versions,
    ) -> None:
        self.config = config
        self.client = client
        self.task = task
        self.runner = runner
        self.tokenizer = tokenizer
        self.versions = versions

    def collect(
        self, step: int, position: int, progress: Callable[[str], None] = lambda line: None
    ) -> Collected:
        """Answers to `prompts_per_step` problems, from problem `position` on, and their rewards.

        What fails (an answer, its reward, a whole group) is dropped and counted, never scored 0.
        progress: called as groups complete. Raises TooFewRollouts when nothing is left, and
        StaleRollout for answers from weights other than this run's newest.
        """
        started = time.perf_counter()
        counts: Counter[str] = Counter()
        groups: dict[int, list[tuple[Answer, float]]] = {}
        for _ in range(self.config.refills + 1):
            missing = self.config.prompts_per_step - len(groups)
            if missing <= 0:
                break
            new = self._ask(step, position, missing, counts, progress)
            position += missing
            counts["groups"] += len(new)
            for index, group in new.items():
                if len(group) < 2:
                    counts["groups_failed"] += 1
                    counts["answers_alone"] += len(group)  # good, with nothing to compare it to
                elif self.config.refills and len({reward for _, reward in group}) == 1:
                    counts["groups_without_signal"] += 1
                else:
                    groups[index] = group
        if not groups:
            raise TooFewRollouts(
                f"step {step}: no group of two scored answers is left: {dict(counts)}"
            )
        scored = [
            (index, answer, reward)
            for index, group in sorted(groups.items())
            for answer, reward in group
        ]
        indices, answers, rewards = zip(*scored, strict=True)
        samples = [Sample.of(*answer.turns) for answer in answers]
        return Collected(
            ScoredAnswers(samples, self._shaped(answers, rewards), indices),
            position,
            self._metrics(step, groups, answers, counts, time.perf_counter() - started),
            tuple(answer.text for answer in answers),
        )

    # --- asking ----------------------------------------------------------------------------------

    def _ask(
        self,
        step: int,
        position: int,
        count: int,
        counts: Counter[str],
        progress: Callable[[str], None],
    ) -> dict[int, list[tuple[Answer, float]]]:
        """The scored answers to `count` problems, by the problem's index."""
        problems = [self.task.problem(position + number) for number in range(count)]
        prompts = [list(problem.messages) for problem in problems]
        fields = dict(self.config.sampling)
        if self.config.seeded:
            fields["sampling_seed"] = position * self.config.samples_per_prompt
        scores: dict[int, tuple[list[Answer], Future[list[Outcome]]]] = {}
        groups = self.client.stream_rollouts(
            prompts,
            n=self.config.samples_per_prompt,
            annealing={**self.config.annealing, "step": step},
            max_new_tokens=self.config.max_new_tokens,
            **fields,
        )
        for group in groups:
            answers = self._good(group, step, counts)
            # scored while the other groups are still generated
            texts = [answer.text for answer in answers]
            scores[group.index] = (answers, self.runner.submit(problems[group.index], texts))
            progress(f"{len(scores)} of {count} groups")
        result: dict[int, list[tuple[Answer, float]]] = {}
        for number, (answers, future) in scores.items():
            group_scored = result[position + number] = []
            for answer, reward in zip(answers, future.result(), strict=True):
                if isinstance(reward, RewardFailure):
                    counts[f"rewards_{reward.kind}"] += 1
                else:
                    group_scored.append((answer, reward))
        return result

    def _good(self, group: Group, step: int, counts: Counter[str]) -> list[Answer]:
        """A group's answers without those that failed; aborted ones are continued first."""
        if group.error is not None:
            counts["answers_failed"] += self.config.samples_per_prompt
            return []
        good = []
        for choice in group.answers:
            answer = self._continued(choice, step, counts)
            if answer is None:
                counts["answers_failed"] += 1
            else:
                good.append(answer)
        return good

    def _continued(self, choice: Choice, step: int, counts: Counter[str]) -> Answer | None:
        """An answer that was aborted (a pause for new weights, say) goes on where it was."""
        turns: list[Rollout] = []
        text = choice.text
        while choice.rollout is not None and len(choice.rollout):
            self._check_versions(choice.rollout, step)
            turns.append(choice.rollout)
            if choice.finish_reason != "abort":
                return Answer(tuple(turns), text)
            counts["continued"] += 1
            prompt = turns[0].prompt_token_ids
            assert prompt is not None
            generated = np.concatenate([turn.token_ids for turn in turns])
            left = self.config.max_new_tokens - len(generated)
            if left <= 0:
                return Answer(tuple(turns), text)
            asked = {"token_ids": prompt.tolist(), "prefix_token_ids": generated.tolist()}
            try:
                groups = self.client.rollouts(
                    [asked],
                    annealing={**self.config.annealing, "step": step},
                    max_new_tokens=left,
                    **self.config.sampling,
                ).groups
            except RequestRefused:  # a schedule that cannot be resumed from its tokens alone
                return None
            if not groups[0].answers:
                return None
            choice = groups[0].answers[0]
            if choice.rollout is not None:
                whole = np.concatenate([generated, choice.rollout.token_ids])
                text = self.tokenizer.decode(whole, skip_special_tokens=True)
        return None

    def _check_versions(self, rollout: Rollout, step: int) -> None:
        """Every token is from weights of this run, at most `staleness` updates old."""
        wanted = range(max(0, step - self.config.staleness), step + 1)
        if any(self.versions.step(version) not in wanted for version in rollout.versions):
            raise StaleRollout(
                f"run {self.versions.run_id}, step {step} wants weights of version "
                f"{' or '.join(map(str, wanted))}, an answer came from "
                f"{' and '.join(rollout.versions)}"
            )

    # --- in numbers ------------------------------------------------------------------------------

    def _shaped(self, answers: Sequence[Answer], rewards: Sequence[float]) -> list[float]:
        """Rewards, less what too long an answer costs."""
        if not self.config.overlong_buffer:
            return list(rewards)
        penalties = overlong_penalty(
            torch.tensor([answer.length for answer in answers]),
            self.config.max_new_tokens,
            self.config.overlong_buffer,
            self.config.overlong_factor,
        )
        return [r + p for r, p in zip(rewards, penalties.tolist(), strict=True)]

    def _metrics(
        self,
        step: int,
        groups: Mapping[int, list[tuple[Answer, float]]],
        answers: Sequence[Answer],
        counts: Counter[str],
        seconds: float,
    ) -> dict[str, float]:
        lengths = [answer.length for answer in answers]
        reasons = [answer.turns[-1].finish_reason for answer in answers]
        begun = [self.versions.step(answer.turns[0].versions[0]) for answer in answers]
        behind = [step - first for first in begun if first is not None]  # _check_versions: all
        best = [max(reward for _, reward in group) for group in groups.values()]
        return {
            "rollout/answers": float(len(answers)),
            "rollout/length": sum(lengths) / len(lengths),
            "rollout/truncated": reasons.count("length") / len(reasons),
            "rollout/staleness": sum(behind) / len(behind),
            "time/collect": seconds,
            "time/tokens_per_second": sum(lengths) / seconds,
            "reward/best_of_group": sum(best) / len(best),
            **{f"rollout/{name}": float(number) for name, number in sorted(counts.items())},
        }
