"""Answers for one step: asked of the server, scored as their groups complete, and put in order."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, Field

from ead_client import Choice, Client, RequestRefused, Rollout
from trainer_bridge.algorithms.advantages import overlong_penalty
from trainer_bridge.errors import StaleRollout, TooFewRollouts
from trainer_bridge.policy.batch import Sample
from trainer_bridge.policy.trainer import ScoredAnswers
from trainer_bridge.run.collected import Collected
from trainer_bridge.run.rollout_calls import MOST_ANSWERS, ask, schedule_by_name
from trainer_bridge.run.versions import Versions
from trainer_bridge.settings import Settings
from trainer_bridge.tasks.reward_runner import RewardRunner
from trainer_bridge.tasks.rewards import Outcome, RewardFailure
from trainer_bridge.tasks.task import Problem, Task

CONTINUED_AT_ONCE = 64  # answers that were aborted
MAX_TURNS = 1000  # of one answer; each may be aborted before its first token


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
    "most_answers": "rollout.answers_per_request",
    **dict.fromkeys(("prompts", "entropies", "texts", "idempotency_key"), "the run itself"),
}


class RolloutConfig(Settings):
    """What is asked of the server for each step."""

    prompts_per_step: int = Field(8, ge=1)
    samples_per_prompt: int = Field(8, ge=2, description="answers in a group")
    max_new_tokens: int = Field(256, ge=1)
    annealing: Annotated[dict[str, Any], BeforeValidator(schedule_by_name)] = Field(
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
    answers_per_request: int = Field(
        MOST_ANSWERS, ge=1, description="at most; `ead serve --max-answers` is as many"
    )
    overlong_buffer: int = Field(
        0, ge=0, description="last tokens over which an answer loses reward (DAPO); 0: none"
    )
    overlong_factor: float = Field(1.0, ge=0, description="reward lost at max_new_tokens")
    seeded: bool = Field(
        False,
        description="every answer gets a seed of its own, so that a run can be repeated, where "
        "the server honours seeds; with staleness, weights are then published only when all "
        "answers in progress are complete, so that none mixes two versions",
    )

    @property
    def versions_apart(self) -> bool:
        """Whether weights are published only when no answer is in progress."""
        return self.seeded and self.staleness > 0


@dataclass(frozen=True)
class Answer:
    """One answer on its way: its turns (several if it was aborted and continued), and its end."""

    turns: tuple[Rollout, ...]
    text: str

    @property
    def length(self) -> int:
        """Generated tokens."""
        return sum(len(turn) for turn in self.turns)


def _seeds(first: int | None, offset: int, count: int) -> list[int | None]:
    """Of the answers of one group: they count up from the request's."""
    return [None if first is None else first + offset + number for number in range(count)]


def _good(answers: Sequence[Answer | None], counts: Counter[str]) -> list[Answer]:
    """The answers that came; those that did not are counted."""
    counts["answers_failed"] += answers.count(None)
    return [answer for answer in answers if answer is not None]


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
        self._refusal = ""  # what the server said of the last group that failed

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
        silent: dict[int, list[tuple[Answer, float]]] = {}  # whose rewards are all equal
        for _ in range(self.config.refills + 1):
            missing = self.config.prompts_per_step - len(groups)
            problems = self._problems(position, missing)
            if not problems:
                break
            new = self._ask(step, position, problems, counts, progress)
            position += len(problems)
            counts["groups"] += len(new)
            for index, group in new.items():
                if len(group) < 2:
                    counts["groups_failed"] += 1
                    counts["answers_alone"] += len(group)  # good, with nothing to compare it to
                elif self.config.refills and len({reward for _, reward in group}) == 1:
                    counts["groups_without_signal"] += 1
                    silent[index] = group
                else:
                    groups[index] = group
        if not groups:  # a step that teaches nothing, as without refills
            groups = dict(itertools.islice(silent.items(), self.config.prompts_per_step))
        if not groups:
            ran_out = not self._problems(position, 1)
            why = f"{self.task.name} has no problem {position}" if ran_out else f"{dict(counts)}"
            raise TooFewRollouts(
                f"step {step}: no group of two scored answers is left: {why}{self._refusal}"
            )
        scored = [
            (index, answer, reward)
            for index, group in sorted(groups.items())
            for answer, reward in group
        ]
        indices, answers, rewards = zip(*scored, strict=True)
        samples = [Sample.of(*answer.turns) for answer in answers]
        return Collected(
            ScoredAnswers(
                samples,
                self._shaped(answers, rewards),
                indices,
                [self._behind(step, answer) for answer in answers],
            ),
            position,
            self._metrics(step, groups, answers, counts, time.perf_counter() - started),
            tuple(answer.text for answer in answers),
        )

    # --- asking ----------------------------------------------------------------------------------

    def _problems(self, position: int, count: int) -> list[Problem]:
        """So many from `position` on; fewer where a task ends."""
        problems: list[Problem] = []
        with suppress(IndexError):
            while len(problems) < count:
                problems.append(self.task.problem(position + len(problems)))
        return problems

    def _ask(
        self,
        step: int,
        position: int,
        problems: Sequence[Problem],
        counts: Counter[str],
        progress: Callable[[str], None],
    ) -> dict[int, list[tuple[Answer, float]]]:
        """The scored answers to these problems, by the problem's index."""
        size = self.config.samples_per_prompt
        fields = dict(self.config.sampling)
        first_seed = position * size if self.config.seeded else fields.get("sampling_seed")
        if first_seed is not None:
            fields["sampling_seed"] = first_seed
        scores: dict[int, tuple[list[Answer], Future[list[Outcome]]]] = {}
        done = 0

        def score(index: int, answers: list[Answer]) -> None:
            nonlocal done
            done += 1
            texts = [answer.text for answer in answers]
            scores[index] = (answers, self.runner.submit(problems[index], texts))
            progress(f"{done} of {len(problems)} groups")

        with ThreadPoolExecutor(CONTINUED_AT_ONCE, thread_name_prefix="continue") as pool:
            aborted: dict[int, list[Future[Answer | None]]] = {}
            groups = ask(
                self.client,
                [list(problem.messages) for problem in problems],
                n=size,
                most_answers=self.config.answers_per_request,
                annealing={**self.config.annealing, "step": step},
                max_new_tokens=self.config.max_new_tokens,
                **fields,
            )
            for group in groups:
                if group.error is not None:
                    self._refusal = f"; the server said: {group.error.get('message')}"
                    counts["answers_failed"] += size
                    score(group.index, [])
                    continue
                seeds = _seeds(first_seed, group.index * size, size)
                told = list(zip(group.answers, [step] * size, seeds, strict=False))
                left = [choice.finish_reason for choice in group.answers].count("abort")
                counts["continued"] += left
                if left:
                    aborted[group.index] = [pool.submit(self._finished, *one) for one in told]
                else:  # scored while the other groups are still generated
                    score(group.index, _good([self._finished(*one) for one in told], counts))
            for index, jobs in aborted.items():
                score(index, _good([job.result() for job in jobs], counts))
        result: dict[int, list[tuple[Answer, float]]] = {}
        for number, (answers, future) in scores.items():
            group_scored = result[position + number] = []
            for answer, reward in zip(answers, future.result(), strict=True):
                if isinstance(reward, RewardFailure):
                    counts[f"rewards_{reward.kind}"] += 1
                else:
                    group_scored.append((answer, reward))
        return result

    def _finished(self, choice: Choice, step: int, seed: int | None) -> Answer | None:
        """An answer, which goes on where it was when it was aborted (by a pause for new weights,
        say), also before its first token; None where it failed."""
        turns: list[Rollout] = []
        text = choice.text
        for _ in range(MAX_TURNS):
            rollout = choice.rollout
            if rollout is None or rollout.prompt_token_ids is None:
                return None
            if len(rollout):
                self._check_versions(rollout, step)
                turns.append(rollout)
            if choice.finish_reason != "abort":
                return Answer(tuple(turns), text) if turns else None
            generated = np.concatenate([np.empty(0, np.int64), *(turn.token_ids for turn in turns)])
            if len(generated) >= self.config.max_new_tokens:
                return Answer(tuple(turns), text)
            prompt = turns[0].prompt_token_ids if turns else rollout.prompt_token_ids
            assert prompt is not None
            try:
                (group,) = self.client.stream_rollouts(  # streams are never silent for long
                    [{"token_ids": prompt.tolist(), "prefix_token_ids": generated.tolist()}],
                    **self._rest(step, len(generated), seed),
                )
            except RequestRefused:  # a schedule that cannot be resumed from its tokens alone
                return None
            if not group.answers:
                return None
            choice = group.answers[0]
            if choice.rollout is not None:
                whole = np.concatenate([generated, choice.rollout.token_ids])
                text = self._text(whole, choice.finish_reason)
        return None

    def _text(self, token_ids: NDArray[np.int64], finish_reason: str | None) -> str:
        """As the server says it of an answer that was not interrupted: without its stop string."""
        text = str(self.tokenizer.decode(token_ids, skip_special_tokens=True))
        stops = self.config.sampling.get("stop") or ()
        if finish_reason == "stop" and not self.config.sampling.get("no_stop_trim"):
            for stop in (stops,) if isinstance(stops, str) else stops:
                text = text.partition(stop)[0]
        return text

    def _rest(self, step: int, generated: int, seed: int | None) -> dict[str, Any]:
        """What to ask for an answer of which so many tokens are there, so that it becomes what it
        would have been: every clock and count goes on."""
        fields = dict(self.config.sampling)
        annealing = {**self.config.annealing, "step": step}
        if "position_offset" in annealing:
            annealing["position_offset"] += generated
        if "min_new_tokens" in fields:
            fields["min_new_tokens"] = max(0, fields["min_new_tokens"] - generated)
        if seed is not None:
            fields["sampling_seed"] = seed
        left = self.config.max_new_tokens - generated
        return {**fields, "annealing": annealing, "max_new_tokens": left}

    def _check_versions(self, rollout: Rollout, step: int) -> None:
        """Every token is from weights of this run, at most `staleness` updates old."""
        wanted = range(max(0, step - self.config.staleness), step + 1)
        if any(self.versions.step(version) not in wanted for version in rollout.versions):
            raise StaleRollout(
                f"run {self.versions.run_id}, step {step} wants weights of version "
                f"{' or '.join(map(str, wanted))}, an answer came from "
                f"{' and '.join(rollout.versions)}"
            )

    def _behind(self, step: int, answer: Answer) -> int:
        """Updates since its oldest token."""
        versions = [name for turn in answer.turns for name in turn.versions]
        steps = [self.versions.step(name) for name in versions]
        return max((step - known for known in steps if known is not None), default=0)

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
        behind = [self._behind(step, answer) for answer in answers]
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
