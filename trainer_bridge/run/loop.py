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
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from trainer_bridge.errors import BadConfig, CheckpointFailed, Interrupted
from trainer_bridge.policy import ranks
from trainer_bridge.policy.policy import Policy, load_policy
from trainer_bridge.policy.trainer import Trainer
from trainer_bridge.run import checkpoint
from trainer_bridge.run.checkpoint import Progress
from trainer_bridge.run.collected import Collected
from trainer_bridge.run.config import TrainConfig
from trainer_bridge.run.interrupt import Interrupt
from trainer_bridge.run.lock import alone_in
from trainer_bridge.run.rank_zero import RankZero, Server, Weights
from trainer_bridge.run.report import Display, check_folder
from trainer_bridge.run.start_checks import first_problem
from trainer_bridge.run.versions import new_run_id


def train(
    config: TrainConfig,
    folder: Path,
    server: Server | None,
    display: Display,
    *,
    resume: bool = False,
    finish_step_on_interrupt: bool = False,
) -> None:
    """Run `config` to its end, in `folder`.

    server: on rank 0; the other ranks of `torchrun` only compute, and need none.
    finish_step_on_interrupt: the first SIGINT ends the run after the step in progress, with a
    checkpoint, by raising Interrupted on every rank; a second one raises KeyboardInterrupt at once.

    Raises BadConfig for a folder that already holds a run, unless `resume`; Diverged,
    TooFewRollouts and the other errors of this package as they say, with everything up to the last
    checkpoint kept.
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
        rank_zero = None
        if ranks.rank() == 0:
            assert server is not None
            rank_zero = RankZero(config, folder, server, tokenizer, display, begin)
            at_the_end.callback(rank_zero.close)
        begin = replace(begin, ahead=())  # many answers, which only rank zero needs
        say = None if rank_zero is None else display.say
        interrupt = Interrupt(say, enabled=finish_step_on_interrupt)
        _run(config, saved, trainer, rank_zero, begin, interrupt)
        policy.save(folder / "model", tokenizer)
        if rank_zero is not None:
            rank_zero.finish()


def _reference(config: TrainConfig, device: torch.device) -> Policy | None:
    """A policy with adapters is held to itself without them."""
    if not config.loss.kl_coefficient or config.model.lora is not None:
        return None
    reference, _ = load_policy(config.model, device)
    reference.requires_grad_(False)
    reference.shard()
    return reference


def _run(
    config: TrainConfig,
    saved: Path,
    trainer: Trainer,
    rank_zero: RankZero | None,
    begin: Progress,
    interrupt: Interrupt,
) -> None:
    """The steps, in which all ranks take part."""
    weights = _weights(trainer.policy, config)
    if rank_zero is not None:
        rank_zero.publish(weights, begin.step)
        rank_zero.tell_untold()
    with interrupt:
        _steps(config, saved, trainer, rank_zero, begin, interrupt)


def _steps(
    config: TrainConfig,
    saved: Path,
    trainer: Trainer,
    rank_zero: RankZero | None,
    progress: Progress,
    interrupt: Interrupt,
) -> None:
    """The steps after those of `progress`. Raises Interrupted."""
    unsaved: CheckpointFailed | None = None
    saved_step = begun_at = progress.step
    for step in range(begun_at, config.steps):
        started, interrupt.step = time.perf_counter(), step
        # rank 0 decides for all whether there is another step, with the answers that it sends
        answers: Collected | None = None
        if rank_zero is not None and not interrupt.asked:
            answers = rank_zero.collect(step)
        collected = ranks.broadcast(answers)
        if collected is None:
            if saved_step < step:
                unsaved = _save(saved, trainer, rank_zero, progress, config)
            raise unsaved or Interrupted(f"stopped by Ctrl-C after step {step}", done=step)
        with _timed(rank_zero, "update"):
            metrics = trainer.update(collected.answers)
        if rank_zero is not None and config.rollout.versions_apart:
            rank_zero.wait_for_asked()
        weights = _weights(trainer.policy, config)
        if rank_zero is not None:
            rank_zero.publish(weights, step + 1)
            metrics |= rank_zero.numbers(step, collected, time.perf_counter() - started)
        progress = Progress(step + 1, collected.position, progress.run_id, metrics)
        every, last = config.checkpoint.every, step + 1 == config.steps
        if last or (every and (step + 1) % every == 0) or unsaved is not None:
            unsaved = _save(saved, trainer, rank_zero, progress, config)
            saved_step = step + 1 if unsaved is None else saved_step
        if rank_zero is not None:
            rank_zero.tell(step, {**metrics, "checkpoint/failed": float(unsaved is not None)})
            if unsaved is not None:
                rank_zero.display.say(f"no checkpoint: {unsaved}; trying again after the next step")
    if unsaved is not None:
        raise unsaved


def _save(
    saved: Path,
    trainer: Trainer,
    rank_zero: RankZero | None,
    progress: Progress,
    config: TrainConfig,
) -> CheckpointFailed | None:
    """A checkpoint, with the answers that were generated ahead. What went wrong is returned, since
    a full disk must not end a run that continues in memory."""
    with _timed(rank_zero, "checkpoint"):
        if rank_zero is not None:
            progress = replace(progress, ahead=rank_zero.ahead())
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
def _timed(rank_zero: RankZero | None, phase: str) -> Iterator[None]:
    if rank_zero is None:
        yield
    else:
        with rank_zero.phase(phase):
            yield
