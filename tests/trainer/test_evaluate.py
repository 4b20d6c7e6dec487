"""An evaluation asks the real server, and reports what came back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from ead_client import Choice, Client, Group, Rollout
from ead_server.launch.process import ServerProcess
from trainer_bridge.algorithms.estimators import (
    bootstrap_interval,
    maj_at_k,
    mean_at_k,
    pass_at_k,
    worst_at_k,
)
from trainer_bridge.run.evaluate import Evaluation, EvaluationConfig, evaluate
from trainer_bridge.tasks.reward_runner import RewardRunner
from trainer_bridge.tasks.rewards import RewardConfig

SCHEDULE = {"schedule": "ead", "tau_max": 1.4, "tau_min": 0.2, "decay": 10.0, "warmup": 2}


@dataclass(frozen=True)
class Prompt:
    messages: tuple[dict[str, str], ...]


class Letters:
    """Twelve held-out problems; an answer's first character decides its reward and its vote."""

    name = "letters"

    def problem(self, index: int, split: str = "train") -> Prompt:
        if split == "eval" and index >= 12:
            raise IndexError(index)
        return Prompt(({"role": "user", "content": f"{split} {index}"},))

    def reward(self, problem: Prompt, answer: str) -> float:
        assert problem.messages[0]["content"].startswith("eval")
        return float(bool(answer) and ord(answer[0]) % 2 == 0)

    def final_answer(self, answer: str) -> str | None:
        return answer[0] if answer else None


class Troubled(Letters):
    """Some answers have no reward, and one problem is too long for the server."""

    def problem(self, index: int, split: str = "train") -> Prompt:
        prompt = super().problem(index, split)
        if index == 3:
            return Prompt(({"role": "user", "content": "eval" + " x" * 6000},))
        return prompt

    def reward(self, problem: Prompt, answer: str) -> float:
        if problem.messages[0]["content"] == "eval 1":
            raise ValueError("this one")
        if problem.messages[0]["content"] == "eval 2":
            return float("nan")
        return super().reward(problem, answer)


class Listening(Client):
    """The client, keeping what passes through it."""

    def __init__(self, url: str, **fields: Any) -> None:
        super().__init__(url, **fields)
        self.calls: list[list[Group]] = []

    def stream_rollouts(self, *args: Any, **fields: Any) -> Iterator[Group]:
        self.calls.append([])
        for group in super().stream_rollouts(*args, **fields):
            self.calls[-1].append(group)
            yield group

    @property
    def answers(self) -> list[list[Choice]]:
        """[P][n], in the order of the problems."""
        return [
            group.answers for call in self.calls for group in sorted(call, key=lambda g: g.index)
        ]


@pytest.fixture
def listening(server: ServerProcess) -> Iterator[Listening]:
    with Listening(server.url, admin_api_key=server.admin_api_key, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def rewards() -> Iterator[RewardRunner]:
    with RewardRunner(Letters().reward, RewardConfig(workers=1)) as runner:
        yield runner


def temperatures(client: Listening) -> set[float]:
    rollouts = [choice.rollout for answers in client.answers for choice in answers]
    return {round(float(t), 4) for rollout in rollouts if rollout for t in rollout.temperatures}


def test_an_evaluation_reports_the_estimates_of_the_answers_it_got(
    listening: Listening, rewards: RewardRunner
) -> None:
    seen: list[tuple[int, int]] = []
    config = EvaluationConfig(
        problems=10,
        n=5,
        max_new_tokens=6,
        annealing=SCHEDULE,
        answers_per_request=21,
        confidence=0.8,
        seed=3,
    )
    got = evaluate(listening, Letters(), rewards, config, lambda *counts: seen.append(counts))

    assert [len(call) for call in listening.calls] == [4, 4, 2]
    assert seen == [(done, 10) for done in range(1, 11)]
    task, answers = Letters(), listening.answers
    texts = [[choice.text for choice in group] for group in answers]
    table = np.array(
        [[task.reward(task.problem(0, "eval"), text) for text in group] for group in texts]
    )
    votes = [[task.final_answer(text) for text in group] for group in texts]
    want = {"mean@5": mean_at_k(table)}
    want |= {f"pass@{k}": pass_at_k(table, k) for k in (1, 2, 4)}
    want |= {f"worst@{k}": worst_at_k(table, k) for k in (2, 4)}
    want |= {f"maj@{k}": maj_at_k(table, votes, k) for k in (2, 4)}
    assert {name: estimate.value for name, estimate in got.estimates.items()} == pytest.approx(
        {name: estimates.mean() for name, estimates in want.items()}
    )
    assert 0 < got.estimates["mean@5"].value < 1  # or the test would see nothing
    for name, estimate in got.estimates.items():
        interval = bootstrap_interval(want[name], confidence=0.8, seed=3)
        assert (estimate.low, estimate.high) == pytest.approx(interval), name
        assert estimate.low <= estimate.value <= estimate.high
        assert estimate.problems == 10
    assert got.estimates["mean@5"].low < got.estimates["mean@5"].high
    assert got.interval == "80% over problems (arXiv 1905.06208), seed 3, for rewards from 0 to 1"

    assert (got.task, got.problems, got.n, got.scored, got.failures) == ("letters", 10, 5, 50, {})
    assert got.weight_versions == [listening.model_info()["weight_version"]]
    assert got.decoding.items() >= SCHEDULE.items()
    assert got.mean_tokens == pytest.approx(
        np.mean([len(c.rollout) for group in answers for c in group if c.rollout])
    )
    assert got.truncated == pytest.approx(
        np.mean([c.finish_reason == "length" for group in answers for c in group])
    )
    assert Evaluation.model_validate_json(got.model_dump_json()) == got

    at_once = config.model_copy(update={"answers_per_request": 4096})
    assert evaluate(listening, Letters(), rewards, at_once).rewards == got.rewards  # seeded


def test_a_fixed_temperature_stays_fixed_whatever_the_server_s_default_is(
    listening: Listening, rewards: RewardRunner
) -> None:
    listening.request("PUT", "/v1/annealing", {"annealing": SCHEDULE}, admin=True)
    try:
        list(listening.stream_rollouts(["x"], max_new_tokens=20, ignore_eos=True))
        assert len(temperatures(listening)) > 5  # the default schedule is in effect
        for temperature in (1.0, 0.7):
            listening.calls.clear()
            config = EvaluationConfig(problems=3, n=2, max_new_tokens=20, temperature=temperature)
            got = evaluate(listening, Letters(), rewards, config)
            assert temperatures(listening) == {temperature}
            assert (got.decoding["schedule"], got.decoding["tau"]) == ("constant", temperature)
    finally:
        listening.request("PUT", "/v1/annealing", {"annealing": None}, admin=True)


def test_greedy_decoding_gives_the_same_answer_every_time(
    listening: Listening, rewards: RewardRunner
) -> None:
    config = EvaluationConfig(problems=4, n=3, max_new_tokens=8, temperature=0)
    got = evaluate(listening, Letters(), rewards, config)
    assert got.decoding == {"temperature": 0.0}
    assert all(len({choice.text for choice in group}) == 1 for group in listening.answers)
    assert got.estimates["pass@2"] == got.estimates["worst@2"]


def test_answers_without_reward_are_counted_by_kind_and_never_scored(
    listening: Listening,
) -> None:
    config = EvaluationConfig(problems=100, n=4, max_new_tokens=4)
    with RewardRunner(Troubled().reward, RewardConfig(workers=1)) as runner:
        got = evaluate(listening, Troubled(), runner, config)
    assert got.problems == 12  # there are no more
    assert got.failures == {"generation": 4, "not_finite": 4, "raised": 4}
    assert got.scored == 36
    assert {estimate.problems for estimate in got.estimates.values()} == {9}
    kept = [answers for i, answers in enumerate(listening.answers) if i not in (1, 2, 3)]
    prompt = Letters().problem(0, "eval")
    scores = [[Letters().reward(prompt, c.text) for c in answers] for answers in kept]
    assert got.estimates["mean@4"].value == pytest.approx(np.mean(scores))


def test_a_schedule_gets_the_training_step_unless_it_names_one(rewards: RewardRunner) -> None:
    class Asked:
        def stream_rollouts(self, prompts: Any, *, annealing: Any, **_: Any) -> Iterator[Group]:
            asked.append(annealing)
            return iter(())

    asked: list[Any] = []
    client: Any = Asked()
    for annealing in (SCHEDULE, {**SCHEDULE, "step": 3}):
        config = EvaluationConfig(problems=2, n=2, annealing=annealing)
        evaluate(client, Letters(), rewards, config, step=7)
    assert [annealing["step"] for annealing in asked] == [7, 3]


def test_a_schedule_and_a_temperature_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="leave `temperature` at 1"):
        EvaluationConfig(annealing=SCHEDULE, temperature=0.5)


class Answering:
    """A client whose answers are all alike; at most 128 to a prompt in one call."""

    def __init__(self, text: str) -> None:
        self.text = text

    def stream_rollouts(self, prompts: Any, *, n: int, **_: Any) -> Iterator[Group]:
        for index, prompt in enumerate(prompts):
            size = prompt["n"] if isinstance(prompt, dict) else n
            assert size <= 128
            rollout = Rollout(
                token_ids=[1],
                temperatures=[1.0],
                logprobs=[-1.0],
                model_logprobs=[-1.0],
                weight_version="1",
            )
            one = Choice(index=0, text=self.text, finish_reason="stop", rollout=rollout)
            yield Group(index=index, prompt_token_ids=[], answers=[one] * size)


class Signed(Letters):
    """Rewards of -1 and 1."""

    def reward(self, problem: Prompt, answer: str) -> float:
        return 1.0 if answer == "right" else -1.0


@pytest.mark.parametrize(("text", "value"), [("right", 1.0), ("wrong", -1.0)])
def test_intervals_of_what_is_always_the_same_are_those_of_its_range(
    text: str, value: float
) -> None:
    """A problem is one draw, however many answers it has; also one problem alone."""
    client: Any = Answering(text)
    with RewardRunner(Signed().reward, RewardConfig(workers=1)) as runner:
        for count, n in ((12, 3), (1, 300)):
            config = EvaluationConfig(problems=count, n=n, reward_range=(-1.0, 1.0))
            got = evaluate(client, Signed(), runner, config)
            assert got.scored == count * n
            edge = 0.025 ** (1 / count)
            mean, solved = got.estimates[f"mean@{n}"], got.estimates["pass@2"]
            ends = (-1 + 2 * edge, 1.0) if value > 0 else (-1.0, 1 - 2 * edge)
            assert (mean.value, mean.low, mean.high) == pytest.approx((value, *ends))
            ends = (edge, 1.0) if value > 0 else (0.0, 1 - edge)
            assert (solved.low, solved.high) == pytest.approx(ends)
