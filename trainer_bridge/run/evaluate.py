"""Evaluation on held-out problems, under a fixed temperature or a schedule."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ead_client import Choice, Client, Group, Rollout
from trainer_bridge.algorithms import estimators
from trainer_bridge.errors import BadConfig
from trainer_bridge.run.rollout_calls import MOST_ANSWERS, ask, schedule_by_name
from trainer_bridge.settings import Settings
from trainer_bridge.tasks.reward_runner import RewardRunner
from trainer_bridge.tasks.rewards import Outcome, RewardFailure
from trainer_bridge.tasks.task import Problem, Task

MOST_PROBLEMS = 64  # where no number is asked for


class EvaluationConfig(Settings):
    """What is asked, and how it is decoded."""

    problems: int | None = Field(
        default=None,
        ge=1,
        description=f"held-out problems, of which the task must have so many; "
        f"none: {MOST_PROBLEMS}, or all where there are fewer",
    )
    n: int = Field(default=8, ge=1, le=1000, description="answers to each")
    max_new_tokens: int = Field(default=512, ge=1)
    temperature: float = Field(
        default=1.0, ge=0, le=10, description="of every token; 0: the likeliest one"
    )
    annealing: Annotated[dict[str, Any] | None, BeforeValidator(schedule_by_name)] = Field(
        default=None, description="a schedule, in place of the temperature"
    )
    solved_at: float = Field(default=1.0, description="reward from which on a problem is solved")
    reward_range: tuple[float, float] = Field(
        default=(0.0, 1.0),
        description="smallest and largest reward that an answer can have, which intervals need to "
        "know; wider where wider rewards are seen",
    )
    confidence: float = Field(default=0.95, gt=0, lt=1, description="of the intervals")
    seed: int = Field(
        default=0,
        ge=0,
        lt=1 << 32,
        description="of the resampling of problems, and, where the server honours seeds, of the "
        "answers: the same weights then evaluate the same",
    )
    answers_per_request: int = Field(
        default=MOST_ANSWERS, ge=1, description="at most; `ead serve --max-answers` is as many"
    )

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        if self.annealing is not None and self.temperature != 1.0:
            raise ValueError("a schedule gives the temperature: leave `temperature` at 1")
        low, high = self.reward_range
        if low > high:
            raise ValueError(f"reward_range: {low} is above {high}")
        return self


class Estimate(BaseModel):
    """A mean over problems, and its interval."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float
    high: float
    problems: int = Field(description="that have enough scored answers")


class Evaluation(BaseModel):
    """What an evaluation found, and under which conditions."""

    model_config = ConfigDict(frozen=True)

    task: str
    decoding: dict[str, Any] = Field(description="the schedule as the server applied it")
    weight_versions: list[str] = Field(description="that answers were sampled from; one is right")
    problems: int
    n: int
    scored: int = Field(description="answers that have a reward")
    failures: dict[str, int] = Field(description="answers that have none, by kind")
    mean_tokens: float = Field(description="per scored answer")
    truncated: float = Field(description="share of scored answers that ended at max_new_tokens")
    interval: str = Field(description="what the intervals are")
    estimates: dict[str, Estimate] = Field(description="mean@n, pass@k, worst@k, maj@k")
    rewards: list[list[float | None]] = Field(
        repr=False, description="of each answer, by problem; null where there is none"
    )


def evaluate(
    client: Client,
    task: Task,
    rewards: RewardRunner,
    config: EvaluationConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    step: int | None = None,
) -> Evaluation:
    """Ask the held-out problems (see `held_out`) and score the answers while others are generated.

    rewards: runs `task.reward`. progress: called with the number of problems that are answered, and
    of all. step: the training step, for a schedule that names none. maj@k is reported for tasks
    that say what votes, see Task. Raises the client's errors; what fails for a single answer is
    counted.
    """
    problems = held_out(task, config.problems)
    final_answer: Callable[[str], str | None] | None = getattr(task, "final_answer", None)
    table = np.full((len(problems), config.n), np.nan)
    votes: list[list[str | None]] = [[None] * config.n for _ in problems]
    failures: Counter[str] = Counter()
    scored: list[Rollout] = []
    waiting: list[tuple[int, list[Choice], Future[list[Outcome]]]] = []
    for position, group in _answers(client, problems, config, step):
        answers = [choice for choice in group.answers if _usable(choice)]
        failures["generation"] += config.n - len(answers)
        texts = [choice.text for choice in answers]
        waiting.append((position, answers, rewards.submit(problems[position], texts)))
        progress(len(waiting), len(problems))
    for position, answers, future in waiting:
        for column, (choice, outcome) in enumerate(zip(answers, future.result(), strict=True)):
            if isinstance(outcome, RewardFailure):
                failures[outcome.kind] += 1
                continue
            table[position, column] = outcome
            if choice.rollout is not None:
                scored.append(choice.rollout)
            if final_answer is not None:
                votes[position][column] = final_answer(choice.text)
    return Evaluation(
        task=task.name,
        decoding=_decoding(scored),
        weight_versions=sorted({version for rollout in scored for version in rollout.versions}),
        problems=len(problems),
        n=config.n,
        scored=len(scored),
        failures={kind: count for kind, count in sorted(failures.items()) if count},
        mean_tokens=_mean([len(rollout) for rollout in scored]),
        truncated=_mean([rollout.finish_reason == "length" for rollout in scored]),
        interval=(
            f"{100 * config.confidence:g}% over problems (arXiv 1905.06208), seed {config.seed}, "
            "for rewards from {:g} to {:g}".format(*_bounds(table, config))
        ),
        estimates=dict(_estimates(table, votes if final_answer else None, config)),
        rewards=[[None if np.isnan(r) else float(r) for r in row] for row in table],
    )


def held_out(task: Task, count: int | None) -> list[Problem]:
    """The first `count` problems of a task's evaluation, or all where there are fewer.

    Raises BadConfig where there are none, or two that ask the same: an evaluation would take them
    for two problems.
    """
    asked: dict[str, Problem] = {}
    with suppress(IndexError):
        for index in range(MOST_PROBLEMS if count is None else count):
            problem = task.problem(index, "eval")
            asked[question(problem)] = problem
            if len(asked) == index:
                raise BadConfig(
                    f"task: {task.name} asks the same in evaluation problem {index} as before"
                )
    if not asked:
        raise BadConfig(f"task: {task.name} has no problem for evaluation")
    return list(asked.values())


def question(problem: Problem) -> str:
    """What is asked, to tell whether two problems are one."""
    return json.dumps([dict(message) for message in problem.messages], default=str)


def _answers(
    client: Client, problems: Sequence[Problem], config: EvaluationConfig, step: int | None
) -> Iterator[tuple[int, Group]]:
    """Each group with its problem's position, as it completes."""
    sampling: dict[str, Any] = {"max_new_tokens": config.max_new_tokens}
    if config.temperature > 0:
        sampling["sampling_seed"] = config.seed
    annealing = config.annealing
    if config.temperature == 0.0:
        sampling["temperature"] = 0.0
    elif annealing is None:
        # said as a schedule, so that no default schedule of the server comes in its place
        annealing = {"schedule": "constant", "tau": config.temperature}
    elif step is not None:  # else the server's own count of updates would come in its place
        annealing = {"step": step, **annealing}
    prompts = [list(problem.messages) for problem in problems]
    most = config.answers_per_request
    for group in ask(
        client, prompts, n=config.n, most_answers=most, annealing=annealing, **sampling
    ):
        yield group.index, group


def _usable(choice: Choice) -> bool:
    """Whether the answer came to its own end: not failed, and not aborted by the server."""
    return choice.rollout is not None and choice.finish_reason != "abort"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _decoding(scored: Sequence[Rollout]) -> dict[str, Any]:
    """As the server reports it; without a schedule, decoding was greedy."""
    return (scored[0].annealing if scored else None) or {"temperature": 0.0}


def _estimates(
    rewards: estimators.Floats, votes: list[list[str | None]] | None, config: EvaluationConfig
) -> Iterator[tuple[str, Estimate]]:
    """mean@n, and the others at k = 1, 2, 4, ... up to n, where a problem has so many scores."""
    bounds = _bounds(rewards, config)
    ks = [2**i for i in range(config.n.bit_length())]
    found = [(f"mean@{config.n}", estimators.mean_at_k(rewards))]
    for k in ks:
        solved_at = config.solved_at
        found.append((f"pass@{k}", estimators.pass_at_k(rewards, k, solved_at=solved_at)))
    found += [(f"worst@{k}", estimators.worst_at_k(rewards, k)) for k in ks[1:]]
    if votes is not None:
        found += [(f"maj@{k}", estimators.maj_at_k(rewards, votes, k)) for k in ks[1:]]
    for name, estimates in found:
        known = estimates[~np.isnan(estimates)]
        if len(known):
            low, high = estimators.bootstrap_interval(
                known,
                confidence=config.confidence,
                bounds=(0.0, 1.0) if name.startswith("pass@") else bounds,
                seed=config.seed,
            )
            value = float(known.mean())
            yield name, Estimate(value=value, low=low, high=high, problems=len(known))


def _bounds(rewards: estimators.Floats, config: EvaluationConfig) -> tuple[float, float]:
    """Of a reward, as far as is known."""
    low, high = config.reward_range
    seen = rewards[~np.isnan(rewards)].tolist()
    return min([low, *seen]), max([high, *seen])
