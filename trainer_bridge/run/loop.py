"""A run: collect, update, publish, step after step; it survives what kills its parts.

With `rollout.staleness` = k, answers for later steps are generated while the policy is updated,
from weights at most k updates old; with 0, one thing happens after the other. A checkpoint keeps
the answers that older weights gave: a run that goes on does not have those weights any more.

A run goes on from its newest checkpoint with `resume`. A server that dies or loses its weights is
waited for, given the weights again, and asked again: an answer counts only if it was sampled from
weights that this run published, which their version names (`versions`).
"""

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

import torch
from torch import Tensor

from ead_client import Client
from trainer_bridge.errors import BadConfig, CheckpointFailed, StaleRollout
from trainer_bridge.policy import ranks
from trainer_bridge.policy.policy import Policy, load_policy
from trainer_bridge.policy.trainer import Trainer
from trainer_bridge.run import checkpoint
from trainer_bridge.run.checkpoint import Progress
from trainer_bridge.run.collect import Collector
from trainer_bridge.run.collected import Collected
from trainer_bridge.run.config import TrainConfig
from trainer_bridge.run.evaluate import evaluate
from trainer_bridge.run.lock import alone_in
from trainer_bridge.run.report import Display, RunFolder, changes, check_folder, draw_curves
from trainer_bridge.run.retries import may_pass, mended
from trainer_bridge.run.start_checks import build_task, check_run, first_problem
from trainer_bridge.run.versions import Versions, new_run_id
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


def train(
    config: TrainConfig,
    folder: Path,
    server: Server | None,
    display: Display,
    *,
    resume: bool = False,
) -> None:
    """Run `config` to its end, in `folder`.

    server: on rank 0; the other ranks of `torchrun` only compute, and need none. Raises BadConfig
    for a folder that already holds a run, unless `resume`; Diverged, TooFewRollouts and the other
    errors of this package as they say, with everything up to the last checkpoint kept.
    """
    device = ranks.join(config.ranks_timeout_s)
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(ranks.leave)
        if ranks.rank() == 0:
            at_the_end.enter_context(alone_in(folder))
        saved = folder / "checkpoints"
        if checkpoint.exist(saved) and not resume:
            raise BadConfig(f"{folder} already holds a run: go on with --resume, or choose another")
        check_folder(folder, resume=resume)
        torch.manual_seed(config.seed)
        policy, tokenizer = load_policy(config.model, device)
        policy.shard()
        trainer = Trainer(
            policy,
            optimizer=config.optimizer,
            update=config.update,
            advantage=config.advantage,
            loss=config.loss,
            correction=config.correction,
            max_new_tokens=config.rollout.max_new_tokens,
            reference=_reference(config, device),
        )
        begin = Progress(0, position=first_problem(config.seed), run_id=new_run_id())
        if resume:
            begin = checkpoint.load(saved, trainer, display.say) or begin
        leader = None
        if ranks.rank() == 0:
            assert server is not None
            leader = Leader(config, folder, server, tokenizer, display, begin)
            at_the_end.callback(leader.close)
        begin = replace(begin, ahead=())  # many answers, which the leader alone has a use for
        _run(config, saved, trainer, leader, begin)
        policy.save(folder / "model", tokenizer)
        if leader is not None:
            leader.finish()


def _reference(config: TrainConfig, device: torch.device) -> Policy | None:
    """A policy with adapters is held to itself without them."""
    if not config.loss.kl_coefficient or config.model.lora is not None:
        return None
    reference, _ = load_policy(config.model, device)
    reference.requires_grad_(False)
    reference.shard()
    return reference


def _run(
    config: TrainConfig, saved: Path, trainer: Trainer, leader: Leader | None, begin: Progress
) -> None:
    """The steps, in which all ranks take part."""
    weights = _weights(trainer.policy, config)
    if leader is not None:
        leader.publish(weights, begin.step)
        leader.tell_untold()
    unsaved: CheckpointFailed | None = None
    for step in range(begin.step, config.steps):
        started = time.perf_counter()
        collected = ranks.broadcast(leader.collect(step) if leader else None)
        with _timed(leader, "update"):
            metrics = trainer.update(collected.answers)
        if leader is not None and config.rollout.versions_apart:
            leader.wait_for_asked()
        weights = _weights(trainer.policy, config)
        if leader is not None:
            leader.publish(weights, step + 1)
        every, last = config.checkpoint.every, step + 1 == config.steps
        if leader is not None:
            metrics |= leader.numbers(step, collected, time.perf_counter() - started)
        if last or (every and (step + 1) % every == 0) or unsaved is not None:
            with _timed(leader, "checkpoint"):
                ahead = leader.ahead() if leader is not None else ()
                progress = Progress(step + 1, collected.position, begin.run_id, metrics, ahead)
                unsaved = _save(saved, trainer, progress, config)
        if leader is not None:
            leader.tell(step, {**metrics, "checkpoint/failed": float(unsaved is not None)})
            if unsaved is not None:
                leader.display.say(f"no checkpoint: {unsaved}; trying again after the next step")
    if unsaved is not None:
        raise unsaved


def _save(
    saved: Path, trainer: Trainer, progress: Progress, config: TrainConfig
) -> CheckpointFailed | None:
    """A full disk must not end a run that goes on in memory."""
    try:
        checkpoint.save(saved, trainer, progress, keep=config.checkpoint.keep)
    except CheckpointFailed as error:
        return error
    return None


def _weights(policy: Policy, config: TrainConfig) -> Weights:
    """The policy's weights as they are now, as often as they are asked for.

    Sharded ones are gathered here, where all ranks are, and held by rank 0 on the CPU. With
    `versions_apart` they are copied too, since after the next update answers may have to be asked
    of them again.
    """
    adapters = policy.has_adapters and config.sync.sends_adapters
    named = policy.named_adapters if adapters else policy.named_weights
    scale = policy.lora_scale if adapters else None
    if ranks.world_size() == 1 and not config.rollout.versions_apart:
        return Weights(named, scale)
    held = [
        (name, weight.detach().to("cpu", copy=True))
        for name, weight in named()
        if ranks.rank() == 0
    ]
    return Weights(lambda: iter(held), scale)


@contextlib.contextmanager
def _timed(leader: Leader | None, phase: str) -> Iterator[None]:
    if leader is None:
        yield
    else:
        with leader.phase(phase):
            yield


def _came(asked: Asked) -> bool:
    return not asked.answers.cancelled() and asked.answers.exception() is None


def _shapes_answers(change: str) -> bool:
    """Whether answers or rewards would be others under a changed setting, or not allowed."""
    return change.startswith(("task.", "rollout.", "reward.", "correction."))


def _given(collected: Collected) -> Future[Collected]:
    future: Future[Collected] = Future()
    future.set_result(collected)
    return future


class Leader:
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
            self._mended(self._publish)
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
            collected = self._mended(self._first_pending)
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
            self._mended(self._all_pending)

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

    def _mended(self, action: Callable[[], T]) -> T:
        """The result of `action`, done again after the server has been given its weights again."""

        def mend() -> None:
            self.server.wait_until_ready()
            if action != self._publish:
                self._publish()
                self._forget_failed()

        patience = self.config.server.patience_s
        return mended(action, mend=mend, patience_s=patience, say=self.display.say)

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
                metrics = metrics | self._mended(self._evaluate)
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
