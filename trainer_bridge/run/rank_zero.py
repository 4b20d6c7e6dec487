"""What one process of a run does for all: the server, the scores, the files."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from ead_client import Client
from trainer_bridge.errors import StaleRollout
from trainer_bridge.run.checkpoint import Progress
from trainer_bridge.run.collect import Collector
from trainer_bridge.run.collected import Collected
from trainer_bridge.run.config import TrainConfig
from trainer_bridge.run.evaluate import evaluate
from trainer_bridge.run.report import Display, RunFolder, changes, draw_curves
from trainer_bridge.run.retries import may_pass, retried
from trainer_bridge.run.start_checks import build_task, check_run
from trainer_bridge.run.versions import Versions
from trainer_bridge.sync.publisher import weight_publisher
from trainer_bridge.tasks.reward_runner import RewardRunner

T = TypeVar("T")


class Weights(NamedTuple):
    """What is published."""

    named: Callable[[], Iterator[tuple[str, Tensor]]]
    lora_scale: float | None  # of adapters alone; None: all of the model's


class Asked(NamedTuple):
    """Answers to one step, on their way."""

    answers: Future[Collected]
    published: int  # the version of the weights when they were asked for


class Server(Protocol):
    """The server as a run needs it."""

    client: Client  # with the admin key

    def wait_until_ready(self) -> None:
        """Return when it takes requests, having started it again if that is ours to do. Raises
        an EadError when it does not come back."""


def _came(asked: Asked) -> bool:
    return not asked.answers.cancelled() and asked.answers.exception() is None


def _shapes_answers(change: str) -> bool:
    """Whether answers or rewards would be others under a changed setting, or not allowed."""
    return change.startswith(("task.", "rollout.", "reward.", "correction."))


def _given(collected: Collected) -> Future[Collected]:
    future: Future[Collected] = Future()
    future.set_result(collected)
    return future


class RankZero:
    """Rank 0: speaks to the server, scores, and writes what the run leaves behind."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        server: Server,
        tokenizer: Any,
        display: Display,
        begin: Progress,
    ) -> None:
        self.config = config
        self.server = server
        self.display = display
        self.task = build_task(config.task)
        described = config.model_dump(mode="json")
        changed = changes(folder, described) if begin.step else []
        dropped = len(begin.ahead) if any(map(_shapes_answers, changed)) else 0
        if dropped:
            begin = replace(begin, ahead=())
        asked = begin.step + len(begin.ahead)
        # the next problem to ask about; only the thread that asks moves it
        self._position = begin.ahead[-1].position if begin.ahead else begin.position
        check_run(config, self.task, steps=config.steps - asked, first=self._position)
        self.runner = RewardRunner(self.task.reward, config.reward)
        self.publisher = weight_publisher(server.client, config.sync)
        self.versions = Versions(begin.run_id)
        self.collector = Collector(
            config.rollout, server.client, self.task, self.runner, tokenizer, self.versions
        )
        self.folder = RunFolder(
            folder, config.report, described, resumed_at=begin.step, say=display.say
        )
        display.say(
            f"{self.task.name}: run {begin.run_id}, steps {begin.step + 1} to {config.steps}; "
            f"trained: the policy ({config.correction.trained_policy}), "
            f"correction {config.correction.kind}"
        )
        for change in changed:
            display.say(f"changed since the run was stopped: {change}")
        if dropped:
            display.say(f"so {dropped} steps of answers that were generated ahead are asked again")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="collect")
        self._begun = replace(begin, ahead=())  # the step that is worked on
        self._published = begin.step
        self._pending = deque(Asked(_given(step), begin.step) for step in begin.ahead)
        self._weights: Weights | None = None
        self._seconds: dict[str, float] = {}
        self._sync: dict[str, float] = {}

    # --- weights out, answers in -----------------------------------------------------------------

    def publish(self, weights: Weights, step: int) -> None:
        """Return when the server samples from these weights, as this run's version of `step`."""
        self._weights, self._published = weights, step
        with self.phase("publish"):
            self._retried(self._publish)
        self._ask_ahead()

    def _publish(self) -> None:
        assert self._weights is not None
        report = self.publisher.publish(
            self._weights.named(),
            self.versions.name(self._published),
            lora_scale=self._weights.lora_scale,
        )
        self._sync = {
            "sync/bytes": float(report.num_bytes),
            **{f"sync/{phase}": seconds for phase, seconds in report.seconds.items()},
        }

    def collect(self, step: int) -> Collected:
        """The scored answers of `step`, some of which may have been generated ahead."""
        with self.phase("rollout"):
            collected = self._retried(self._first_pending)
        self._pending.popleft()
        self._begun = replace(self._begun, step=step + 1, position=collected.position)
        return collected

    def _first_pending(self) -> Collected:
        self._ask_ahead()
        return self._pending[0].answers.result()

    def wait_for_asked(self) -> None:
        """Return when every answer that has been asked for is there. A server that dies meanwhile
        gets the same weights again, and is asked again. What else fails, `collect` will raise."""
        with self.phase("rollout"):
            self._retried(self._all_pending)

    def _all_pending(self) -> None:
        self._ask_ahead()
        for asked in self._pending:
            error = asked.answers.exception()
            if may_pass(error):
                raise error
            if error is not None:
                return

    def ahead(self) -> tuple[Collected, ...]:
        """What a checkpoint keeps of the next steps: all that was asked of weights older than the
        published ones, which is waited for, and newer answers that are already there."""
        older = [asked.answers for asked in self._pending if asked.published < self._published]
        wait(older)
        there = itertools.takewhile(lambda asked: asked.answers.done(), self._pending)
        return tuple(asked.answers.result() for asked in itertools.takewhile(_came, there))

    def _ask_ahead(self) -> None:
        """Have the answers generated that the published weights are new enough for; none after
        those that failed, since where their problems begin is not known."""
        last = min(self._published + self.config.rollout.staleness, self.config.steps - 1)
        if any(asked.answers.done() and not _came(asked) for asked in self._pending):
            return
        while self._begun.step + len(self._pending) <= last:
            step = self._begun.step + len(self._pending)
            answers = self._thread.submit(self._collect, step)
            self._pending.append(Asked(answers, self._published))

    def _collect(self, step: int) -> Collected:
        try:
            collected = self.collector.collect(step, self._position, self.display.phase)
        except BaseException:
            for asked in list(self._pending):  # they would begin with the problems of this one
                asked.answers.cancel()
            raise
        self._position = collected.position
        return collected

    def _retried(self, action: Callable[[], T]) -> T:
        """The result of `action`, done again after the server has been given its weights again."""

        def mend() -> None:
            self.server.wait_until_ready()
            if action != self._publish:
                self._publish()
                self._forget_failed()

        timeout_s = self.config.server.timeout_s
        return retried(action, mend=mend, timeout_s=timeout_s, say=self.display.say)

    def _forget_failed(self) -> None:
        """Ask again from the first step on whose answers did not come. A step in progress may
        still succeed, since the server has weights again; steps not begun are cancelled."""
        for asked in self._pending:
            asked.answers.cancel()
        wait([asked.answers for asked in self._pending])
        self._pending = deque(itertools.takewhile(_came, self._pending))
        self._position = self._begun.position
        if self._pending:
            self._position = self._pending[-1].answers.result().position

    # --- what is told ----------------------------------------------------------------------------

    def numbers(self, step: int, collected: Collected, seconds: float) -> dict[str, float]:
        """What is known here of a step that is done. Its answers are recorded."""
        self.folder.samples(step, collected.told())
        spent = {f"time/{phase}": spent for phase, spent in self._seconds.items()}
        self._seconds = {}
        return {**collected.metrics, **self._sync, **spent, "time/step": seconds}

    def tell(self, step: int, metrics: dict[str, float]) -> None:
        """Record and show a step whose checkpoint is written; evaluate when it is due."""
        every, last = self.config.evaluate_every, step + 1 == self.config.steps
        if every and (last or (step + 1) % every == 0):
            with self.phase("evaluate"):
                metrics = metrics | self._retried(self._evaluate)
        metrics = metrics | {f"time/{phase}": spent for phase, spent in self._seconds.items()}
        self._seconds = {}
        self.folder.metrics(step, metrics)
        self.display.step(step, metrics)

    def tell_untold(self) -> None:
        """At the start of a run that goes on: the step before, if it was killed before `tell`."""
        step = self._begun.step - 1
        if self._begun.untold and step not in self.folder.told:
            self.tell(step, {**self._begun.untold, "checkpoint/failed": 0.0})

    def _evaluate(self) -> dict[str, float]:
        config, step = self.config.evaluation, self._published
        result = evaluate(self.server.client, self.task, self.runner, config, step=step)
        wanted = self.versions.name(step)
        if others := set(result.weight_versions) - {wanted}:
            raise StaleRollout(f"evaluating {wanted}, answers came from {', '.join(others)}")
        metrics = {f"eval/{name}": found.value for name, found in result.estimates.items()}
        return metrics | {"eval/failed": float(sum(result.failures.values()))}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows and times a phase of the step."""
        self.display.phase(name)
        started = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def finish(self) -> None:
        """At the end of a run that came to its end."""
        try:
            self.display.say(f"curves: {draw_curves(self.folder.path)}")
        except OSError as error:  # of a full disk: `ead plot` draws them later
            self.display.say(f"no curves: {error}")

    def close(self) -> None:
        """End what was started here."""
        self.runner.close()
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.publisher.close()
        self.folder.close()
