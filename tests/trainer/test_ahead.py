"""Answers generated ahead: in which order they are asked for, of which weights, and what a failure
costs. The collector and the publisher are stand-ins that keep a record; test_loop has the real
ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from ead_client import ConnectionFailed
from trainer_bridge.errors import TooFewRollouts
from trainer_bridge.policy.trainer import ScoredAnswers
from trainer_bridge.run.checkpoint import Progress
from trainer_bridge.run.collected import Collected
from trainer_bridge.run.config import read_config
from trainer_bridge.run.loop import RankZero, Weights
from trainer_bridge.run.report import Display

PROBLEMS = 10  # of each step
WEIGHTS = Weights(lambda: iter([("w", torch.zeros(1))]), None)


class Record:
    """What was asked and published, in order; `fails` says which attempts at a step fail."""

    def __init__(self) -> None:
        self.published = -1
        self.events: list[tuple[str, int, int]] = []
        self.fails: list[int] = []
        self.error: Exception = ConnectionFailed("gone")
        self.may_go_on = threading.Event()

    def collect(self, step: int, position: int, progress: Callable[[str], None]) -> Collected:
        self.may_go_on.wait(60)
        self.events.append(("asked", step, self.published))
        assert position == step * PROBLEMS
        if step in self.fails:
            self.fails.remove(step)
            raise self.error
        answers = ScoredAnswers([], [float(self.published)], [], [])
        return Collected(answers, position + PROBLEMS, {}, ())

    def publish(self, tensors: Any, version: str, **_: Any) -> Any:
        assert len(list(tensors)) == 1
        self.published = int(version.rpartition(":")[2])
        self.events.append(("published", self.published, self.published))
        return SimpleNamespace(num_bytes=0, seconds={})


@pytest.fixture
def record() -> Record:
    return Record()


@pytest.fixture
def leader_of(tmp_path: Path, record: Record) -> Iterator[Callable[..., RankZero]]:
    made: list[RankZero] = []

    def make(staleness: int, begin: Progress, *more: str) -> RankZero:
        settings = [
            f"rollout.staleness={staleness}",
            "correction.kind=tis",
            "task.kind=helpers.toys:Letters",
        ]
        settings += ["steps=6", "reward.workers=1", "report.tensorboard=false", *more]
        server = SimpleNamespace(client=SimpleNamespace(), wait_until_ready=lambda: None)
        display = Display(Console(quiet=True), 6)
        leader = RankZero(read_config(settings), tmp_path, server, None, display, begin)
        leader.collector, leader.publisher = record, record  # type: ignore[assignment]
        record.close = lambda: None  # type: ignore[attr-defined]
        made.append(leader)
        return leader

    yield make
    record.may_go_on.set()
    for leader in made:
        leader.close()


def begun(leader_of: Callable[..., RankZero], record: Record, staleness: int = 1) -> RankZero:
    """The leader of a new run. No answer comes before all are asked for that its first weights may
    give."""
    leader = leader_of(staleness, Progress(0, 0, "run"))
    leader.publish(WEIGHTS, 0)
    record.may_go_on.set()
    return leader


def test_a_failure_throws_away_nothing_that_was_generated(
    leader_of: Callable[..., RankZero], record: Record
) -> None:
    """With two steps asked for ahead of the one that fails: neither begins before it is mended."""
    record.fails = [0]
    leader = begun(leader_of, record, staleness=2)
    for step in range(3):
        leader.collect(step)
    published = ("published", 0, 0)
    asked = [("asked", step, 0) for step in (0, 0, 1, 2)]
    assert record.events == [published, asked[0], published, *asked[1:]]


def test_answers_lost_with_the_server_come_from_the_same_weights_again(
    leader_of: Callable[..., RankZero], record: Record
) -> None:
    """What `rollout.seeded` waits for before a publication."""
    record.fails = [1]
    leader = begun(leader_of, record)
    leader.collect(0)
    leader.wait_for_asked()
    leader.publish(WEIGHTS, 1)
    assert leader.collect(1).answers.rewards == [0.0]
    assert record.events[:5] == [
        ("published", 0, 0),
        ("asked", 0, 0),
        ("asked", 1, 0),
        ("published", 0, 0),
        ("asked", 1, 0),
    ]


def test_a_failure_that_does_not_pass_does_not_take_the_step_before_it(
    leader_of: Callable[..., RankZero], record: Record
) -> None:
    """Its update is made, and still to be published and written down."""
    record.error = TooFewRollouts("nothing")
    record.fails = [1]
    leader = begun(leader_of, record)
    leader.collect(0)
    leader.wait_for_asked()
    leader.publish(WEIGHTS, 1)
    with pytest.raises(TooFewRollouts):
        leader.collect(1)


@pytest.mark.parametrize(
    "change", ["rollout.max_new_tokens=7", "rollout.refills=1", "correction.cap=3"]
)
def test_answers_of_other_settings_are_not_kept(
    change: str, leader_of: Callable[..., RankZero], record: Record
) -> None:
    record.may_go_on.set()
    leader_of(1, Progress(0, 0, "run")).close()
    kept = record.collect(1, PROBLEMS, lambda line: None)
    record.events.clear()
    resumed = leader_of(1, Progress(1, PROBLEMS, "run", ahead=(kept,)), change)
    resumed.publish(WEIGHTS, 1)
    assert resumed.collect(1) is not kept
    assert record.events[:2] == [("published", 1, 1), ("asked", 1, 1)]


def test_a_run_goes_on_with_what_older_weights_had_given(
    leader_of: Callable[..., RankZero], record: Record
) -> None:
    """After step 0 the answers to step 1, of version 0, are kept, which nothing can give again.
    Step 2, of version 1, is asked for after them."""
    leader = begun(leader_of, record)
    leader.collect(0)
    leader.wait_for_asked()
    record.may_go_on.clear()  # nothing newer is done when the checkpoint is written
    leader.publish(WEIGHTS, 1)
    (kept,) = leader.ahead()
    assert kept.answers.rewards == [0.0]
    record.may_go_on.set()
    leader.close()

    record.events.clear()
    resumed = leader_of(1, Progress(1, PROBLEMS, "run", ahead=(kept,)))
    resumed.publish(WEIGHTS, 1)
    assert resumed.collect(1) is kept
    assert resumed.collect(2).answers.rewards == [1.0]
    assert ("asked", 2, 1) in record.events
    assert not any(step == 1 for kind, step, _ in record.events if kind == "asked")
