"""Everything a run needs to go on as if it had not been stopped.

Written by torch.distributed.checkpoint, so that a run may go on with another number of ranks. A
checkpoint appears under its name in one step, when it is whole and on the disk: whatever kills the
process, the newest one is complete. What happens to its files later, their checksums tell: one
that was damaged is set aside under another name, and the one before it serves.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from trainer_bridge.errors import BadConfig, CheckpointFailed
from trainer_bridge.policy import ranks
from trainer_bridge.policy.trainer import Trainer
from trainer_bridge.run.collected import Collected, load_steps, save_steps
from trainer_bridge.run.versions import new_run_id
from trainer_bridge.settings import Settings

_AHEAD = "ahead.safetensors"  # answers to the next steps
_SUMS = "SHA256SUMS"  # of all other files, as sha256sum writes and checks them
# With adapters, the rest is the model's own, and neither saved nor missed: that everything which is
# trained is in a checkpoint, its reader checks.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


class CheckpointConfig(Settings):
    """When to save, and how many to keep."""

    every: int = Field(10, ge=0, description="steps; 0: only after the last one")
    keep: int = Field(2, ge=1, description="newest checkpoints")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: its next step, and the next problem that nobody was asked yet."""

    step: int
    position: int
    run_id: str  # see trainer_bridge.run.versions
    # metrics of the step before, which a kill right after the checkpoint leaves unwritten
    untold: Mapping[str, float] = field(default_factory=dict)
    # of this step and those after it, what has been generated from weights of earlier steps
    ahead: tuple[Collected, ...] = field(default=(), repr=False)


def save(folder: Path, trainer: Trainer, progress: Progress, *, keep: int) -> None:
    """Write checkpoint `progress.step` into `folder` and forget all but the newest `keep`.

    Every rank must call it. Raises CheckpointFailed.
    """
    target = folder / f"step-{progress.step:06d}"
    partial = target.with_suffix(".partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
        partial.mkdir(parents=True)

    def finish() -> None:
        save_steps(progress.ahead, partial / _AHEAD)
        about = {
            "step": progress.step,
            "position": progress.position,
            "run_id": progress.run_id,
            "untold": progress.untold,
            "updates": trainer.updates,
            "skipped": trainer.skipped,
            "entropy_anchor": trainer.entropy_anchor,
            "trained_policy": trainer.correction.trained_policy,
        }
        (partial / "progress.json").write_text(json.dumps(about, indent=1))
        sums = [f"{_sha256(file)}  {file.name}\n" for file in sorted(partial.iterdir())]
        (partial / _SUMS).write_text("".join(sums))
        _to_disk(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        _to_disk(folder)
        for old in _complete(folder)[:-keep]:
            shutil.rmtree(old)

    try:
        _on_rank_0(begin)
        try:
            state_dict_saver.save(
                _state(trainer), checkpoint_id=partial, no_dist=ranks.world_size() == 1
            )
        except (OSError, CheckpointException) as error:
            # its text is a traceback, of which the end says what happened
            raise CheckpointFailed(str(error).strip().rpartition("\n")[2]) from error
        _on_rank_0(finish)
    except CheckpointFailed:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _on_rank_0(action: Callable[[], None]) -> None:
    """Raises CheckpointFailed on every rank when the disk refuses the action."""
    problem: str | None = None
    if ranks.rank() == 0:
        try:
            action()
        except OSError as error:
            problem = str(error)
    problem = ranks.broadcast(problem)
    if problem is not None:
        raise CheckpointFailed(problem)


def load(folder: Path, trainer: Trainer, say: Callable[[str], None]) -> Progress | None:
    """Take the trainer back to the newest whole checkpoint; None where there never was one.

    say: told of damaged ones. Every rank must call it. Raises BadConfig when all are damaged, or
    the newest is of a run that trains another policy, see CorrectionConfig.
    """
    newest = ranks.broadcast(_newest_whole(folder, say) if ranks.rank() == 0 else None)
    if newest is None:
        return None
    about = json.loads((newest / "progress.json").read_text())
    if about["trained_policy"] != trainer.correction.trained_policy:
        raise BadConfig(
            f"correction.kind: {trainer.correction.kind!r} trains the policy "
            f"({trainer.correction.trained_policy}), {newest} is of one "
            f"({about['trained_policy']})"
        )
    state = _state(trainer)
    state_dict_loader.load(state, checkpoint_id=newest, no_dist=ranks.world_size() == 1)
    set_state_dict(
        trainer.policy,
        trainer.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_OPTIONS,
    )
    for group in trainer.optimizer.param_groups:  # the settings are this run's, not the saved one's
        group["betas"] = trainer.optimizer_config.betas
        group["weight_decay"] = trainer.optimizer_config.weight_decay
    torch.set_rng_state(state["rng"])
    trainer.updates, trainer.skipped = about["updates"], about["skipped"]
    trainer.entropy_anchor = about["entropy_anchor"]
    run_id = about.get("run_id") or new_run_id()  # older checkpoints have none
    kept = newest / _AHEAD
    ahead = load_steps(kept) if ranks.rank() == 0 and kept.exists() else ()
    return Progress(about["step"], about["position"], run_id, about.get("untold") or {}, ahead)


def _newest_whole(folder: Path, say: Callable[[str], None]) -> Path | None:
    complete = _complete(folder)
    for path in reversed(complete):
        problem = _damage(path)
        if problem is None:
            return path
        aside = path.with_suffix(".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        say(f"{path} is damaged ({problem}): it is kept as {aside.name}")
    if complete:
        raise BadConfig(f"{folder} has no checkpoint that is whole")
    return None


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, if anything is."""
    try:
        if not (path / _SUMS).exists():  # of an older version
            json.loads((path / "progress.json").read_bytes())
            return None
        for line in (path / _SUMS).read_text().splitlines():
            digest, name = line.split("  ", 1)
            if _sha256(path / name) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def exist(folder: Path) -> bool:
    """Whether a run left checkpoints here."""
    return bool(_complete(folder))


def _state(trainer: Trainer) -> dict[str, Any]:
    model, optimizer = get_state_dict(trainer.policy, trainer.optimizer, options=_OPTIONS)
    return {"model": model, "optimizer": optimizer, "rng": torch.get_rng_state()}


def _complete(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in folder.glob("step-*") if not path.suffix)


def _to_disk(folder: Path) -> None:
    """Return when the folder and its files are on the disk."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
