"""What a step is made of when answers are aborted, problems run out, and nothing teaches.

The server here is a stand-in that samples by a formula, so that an answer which was interrupted
anywhere can be compared with the one that was not. (test_loop has the real one.)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import toys
from helpers.toys import Letters, Question

from ead_client import ConnectionFailed, RequestRefused, Rollout
from ead_client._rollouts import Group
from ead_client._types import Choice
from trainer_bridge.errors import BadConfig, TooFewRollouts
from trainer_bridge.run.collect import Collected, Collector, RolloutConfig
from trainer_bridge.run.config import read_config
from trainer_bridge.run.retries import LONGEST_PAUSE, retried
from trainer_bridge.run.versions import Versions
from trainer_bridge.tasks.reward_runner import RewardRunner
from trainer_bridge.tasks.rewards import RewardConfig

VERSIONS = Versions("test")
LETTERS = "abcdefgh"


class FormulaServer:
    """Token t of an answer depends on its seed and on t; its temperature is t's place on the clock.

    aborts: of each request, after how many of its own tokens it is aborted; then none is.
    """

    def __init__(self, aborts: Callable[[], int | None]) -> None:
        self.aborts = aborts
        self.asked: list[dict[str, Any]] = []
        self.refused: set[int] = set()  # prompts

    def _answer(self, index: int, prompt: list[int], prefix: list[int], **asked: Any) -> Choice:
        seed, done = asked.get("sampling_seed") or 0, len(prefix)
        clock = asked["annealing"].get("position_offset", done)
        length = asked["max_new_tokens"]
        stop = self.aborts()
        count = length if stop is None else min(stop, length)
        tokens = [random.Random(f"{seed} {done + t}").randrange(8) for t in range(count)]
        rollout = Rollout(
            token_ids=tokens,
            temperatures=[float(clock + t) for t in range(count)],
            logprobs=[-1.0] * count,
            model_logprobs=[-1.0] * count,
            prompt_token_ids=prompt + prefix,
            weight_version=VERSIONS.name(0),
        )
        text = "".join(LETTERS[token] for token in tokens)
        reason = "length" if count == length else "abort"
        return Choice(index=index, text=text, finish_reason=reason, rollout=rollout)

    def stream_rollouts(self, prompts: list[Any], *, n: int = 1, **asked: Any) -> Iterator[Group]:
        self.asked.append(asked)
        if isinstance(prompts[0], dict):  # the rest of one
            ids, prefix = prompts[0]["token_ids"], prompts[0]["prefix_token_ids"]
            answer = self._answer(0, ids, prefix, **asked)
            yield Group(index=0, prompt_token_ids=[*ids, *prefix], answers=[answer])
            return
        first = asked.get("sampling_seed")
        for index in range(len(prompts)):
            if (index + 1) in self.refused:
                error = {"message": "too long"}
                yield Group(index=index, error=error, prompt_token_ids=[], answers=[])
                continue
            answers = []
            for number in range(n):
                seed = None if first is None else first + index * n + number
                own = {**asked, "sampling_seed": seed}
                answers.append(self._answer(number, [index + 1], [], **own))
            yield Group(index=index, prompt_token_ids=[index + 1], answers=answers)


class Tokenizer:
    def decode(self, ids: Any, *, skip_special_tokens: bool) -> str:
        return "".join(LETTERS[token] for token in ids)


@pytest.fixture(scope="module")
def runners() -> Iterator[Callable[[Any], RewardRunner]]:
    """One worker for each task of this module."""
    made: dict[str, RewardRunner] = {}

    def runner(task: Any) -> RewardRunner:
        name = type(task).__name__
        if name not in made:
            made[name] = RewardRunner(task.reward, RewardConfig(workers=1))
        return made[name]

    yield runner
    for one in made.values():
        one.close()


def collect(
    runners: Any,
    task: Any = None,
    aborts: Callable[[], int | None] = lambda: None,
    position: int = 0,
    **config: Any,
) -> tuple[Collected, FormulaServer]:
    task = task or Letters()
    server: Any = FormulaServer(aborts)
    sized = {"prompts_per_step": 3, "samples_per_prompt": 4, "max_new_tokens": 20, **config}
    settings = RolloutConfig.model_validate(sized)
    tokenizer: Any = Tokenizer()
    made = Collector(settings, server, task, runners(task), tokenizer, VERSIONS)
    return made.collect(0, position), server


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "config",
    [
        {"seeded": True},
        {"seeded": True, "annealing": {"position_offset": 7}},
        {"sampling": {"sampling_seed": 5, "min_new_tokens": 9}},
    ],
)
def test_interrupted_answers_are_what_they_would_have_been(
    seed: int, config: dict[str, Any], runners: Any
) -> None:
    """Every request is aborted after 0 to 4 of its tokens, many before the first."""
    draw = random.Random(seed)
    whole, _ = collect(runners, **config)
    got, server = collect(runners, aborts=lambda: draw.randrange(5), **config)
    assert got.texts == whole.texts
    assert got.answers.rewards == whole.answers.rewards
    for ours, theirs in zip(got.answers.samples, whole.answers.samples, strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert ours.temperatures.tolist() == theirs.temperatures.tolist()
    assert got.metrics["rollout/continued"] == 12
    assert len(server.asked) > 12
    if "min_new_tokens" in config.get("sampling", {}):
        for asked in server.asked:
            # tokens that are there count
            assert asked["min_new_tokens"] == max(0, asked["max_new_tokens"] - 11)


def test_an_answer_that_never_comes_is_failed_and_the_others_are_kept(runners: Any) -> None:
    """A server that aborts everything at once, for ever, ends the step with its counts."""
    with pytest.raises(TooFewRollouts, match="'answers_failed': 4"):
        collect(runners, aborts=lambda: 0, prompts_per_step=1)


def test_a_group_that_the_server_refuses_is_counted(runners: Any) -> None:
    server: Any = FormulaServer(lambda: None)
    server.refused = {2}
    settings = RolloutConfig(prompts_per_step=3, samples_per_prompt=4, max_new_tokens=9)
    tokenizer: Any = Tokenizer()
    made = Collector(settings, server, Letters(), runners(Letters()), tokenizer, VERSIONS)
    got = made.collect(0, 0)
    assert sorted(set(got.answers.group_ids)) == [0, 2]
    assert got.metrics["rollout/groups"] == 3
    assert got.metrics["rollout/groups_failed"] == 1
    assert got.metrics["rollout/answers_failed"] == 4
    server.refused = {1, 2, 3}
    with pytest.raises(TooFewRollouts, match=r"'answers_failed': 12.*; the server said: too long$"):
        made.collect(0, 0)


class Ten(Letters):
    """Ten problems; the rewards of odd ones are all equal."""

    def problem(self, index: int, split: str = "train") -> Question:
        if index >= 10:
            raise IndexError(index)
        return super().problem(index, split)

    def reward(self, problem: Question, answer: str) -> float:
        return 0.5 if problem.index % 2 else super().reward(problem, answer)


def test_a_step_is_made_of_the_problems_that_there_are(runners: Any) -> None:
    """Case 09: of 4 to 9, three have signal, and four are wanted."""
    got, _ = collect(runners, Ten(), position=4, prompts_per_step=4, refills=3, seeded=True)
    assert sorted(set(got.answers.group_ids)) == [4, 6, 8]
    assert got.position == 10
    with pytest.raises(TooFewRollouts, match="letters has no problem 10"):
        collect(runners, Ten(), position=10, prompts_per_step=4)


class Solved(Letters):
    def reward(self, problem: Question, answer: str) -> float:
        return 1.0


def test_a_step_whose_groups_all_teach_nothing_is_one_without_a_gradient(runners: Any) -> None:
    """As without refills; it is counted, and the run goes on."""
    got, _ = collect(runners, Solved(), refills=1)
    assert got.metrics["rollout/groups_without_signal"] == 6
    assert got.answers.rewards == [1.0] * 12
    assert got.position == 6


def test_an_answer_says_how_many_updates_it_is_behind(runners: Any) -> None:
    task: Any = toys.Letters()
    server: Any = FormulaServer(lambda: None)
    settings = RolloutConfig(
        prompts_per_step=2, samples_per_prompt=2, max_new_tokens=3, staleness=2
    )
    tokenizer: Any = Tokenizer()
    made = Collector(settings, server, task, runners(task), tokenizer, VERSIONS)
    assert made.collect(2, 0).answers.behind == [2, 2, 2, 2]


# --- settings that go together, and patience ------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "annealed"])
def test_stale_answers_are_corrected_or_refused(kind: str) -> None:
    asked = [f"correction.kind={kind}", "rollout.staleness=1"]
    with pytest.raises(BadConfig, match=r"rollout.staleness 1 with correction.kind"):
        read_config(asked)
    read_config([*asked, "update.old_logprobs=server"])
    read_config([f"correction.kind={kind}"])


class Clock:
    """Time that passes when somebody waits or works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("trainer_bridge.run.retries.time", made)
    return made


def attempts(clock: Clock, *each: tuple[float, Exception | None]) -> Callable[[], str]:
    """Each lasts so many seconds and then fails, or does not."""
    left = iter(each)

    def action() -> str:
        seconds, error = next(left)
        clock.now += seconds
        if error is not None:
            raise error
        return "done"

    return action


GONE = ConnectionFailed("gone")


def test_a_long_action_has_a_second_chance(clock: Clock) -> None:
    action = attempts(clock, (3600, GONE), (3600, GONE), (3600, None))
    assert retried(action, mend=lambda: None, timeout_s=600, say=print) == "done"


def test_mending_may_fail_as_well(clock: Clock) -> None:
    mend = attempts(clock, (1, GONE), (1, GONE), (1, None))
    action = attempts(clock, (1, GONE), (1, None))
    assert retried(action, mend=mend, timeout_s=600, say=print) == "done"  # type: ignore[arg-type]


def test_patience_ends_and_pauses_grow(clock: Clock) -> None:
    def action() -> None:
        raise GONE

    with pytest.raises(ConnectionFailed):
        retried(action, mend=lambda: None, timeout_s=600, say=lambda line: None)
    assert clock.now == pytest.approx(600)
    assert clock.pauses[:4] == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert max(clock.pauses) == LONGEST_PAUSE
    assert len(clock.pauses) < 40


def test_what_will_not_pass_is_not_tried_again(clock: Clock) -> None:
    error = RequestRefused(400, {"error": {"message": "no"}})
    action = attempts(clock, (1, error), (1, None))
    with pytest.raises(RequestRefused):
        retried(action, mend=lambda: None, timeout_s=600, say=print)
