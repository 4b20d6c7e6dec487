"""Checkpoints: what they bring back, whose settings win, and what damage does."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.updates import answers

from trainer_bridge.algorithms.advantages import AdvantageConfig
from trainer_bridge.algorithms.corrections import CorrectionConfig
from trainer_bridge.algorithms.loss_config import ClipLossConfig
from trainer_bridge.errors import BadConfig
from trainer_bridge.policy import ranks
from trainer_bridge.policy.policy import LoraConfig, ModelConfig, Policy, load_policy
from trainer_bridge.policy.trainer import OptimizerConfig, Trainer, UpdateConfig
from trainer_bridge.run import checkpoint
from trainer_bridge.run.checkpoint import Progress
from trainer_bridge.run.collected import Collected
from trainer_bridge.run.lock import alone_in

LORA = LoraConfig(rank=4, alpha=8)


@pytest.fixture
def made(tiny_model: Path) -> Callable[..., Trainer]:
    def make(lora: LoraConfig | None = None, **optimizer: Any) -> Trainer:
        torch.manual_seed(0)  # of an adapter's first factors
        policy, _ = load_policy(ModelConfig(path=str(tiny_model), lora=lora), "cpu")
        return trainer_of(policy, **optimizer)

    return make


def trainer_of(policy: Policy, **optimizer: Any) -> Trainer:
    return Trainer(
        policy,
        optimizer=OptimizerConfig(**{"learning_rate": 1e-2, "warmup_updates": 5, **optimizer}),
        update=UpdateConfig(),
        advantage=AdvantageConfig(),
        loss=ClipLossConfig(),
        correction=CorrectionConfig(),
        max_new_tokens=16,
    )


def trained(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: w.detach().clone() for name, w in trainer.policy.named_parameters()}


@pytest.mark.parametrize("lora", [None, LORA], ids=["every weight", "adapters"])
def test_a_run_goes_on_bit_for_bit(
    lora: LoraConfig | None, made: Callable[..., Trainer], tmp_path: Path
) -> None:
    """Weights, moments, warm-up: two updates, a checkpoint, two more of answers that were there
    when it was written."""
    whole = made(lora)
    scored = [answers(whole.policy, seed) for seed in range(4)]
    for batch in scored[:2]:
        whole.update(batch)
    ahead = tuple(
        Collected(batch, position, {"rollout/answers": 1.0}, ("a\nb", "\u2028"))
        for position, batch in enumerate(scored[2:], start=8)
    )
    checkpoint.save(tmp_path, whole, Progress(2, 7, "run", {"reward/mean": 0.5}, ahead), keep=2)
    for batch in scored[2:]:
        whole.update(batch)

    resumed, said = made(lora), list[str]()
    with torch.no_grad():
        for weight in resumed.policy.parameters():
            if weight.requires_grad:
                weight.add_(1.0)  # nothing of what it was made with is left
    progress = checkpoint.load(tmp_path, resumed, said.append)
    assert progress is not None
    assert replace(progress, ahead=()) == Progress(2, 7, "run", {"reward/mean": 0.5})
    for kept, step in zip(progress.ahead, ahead, strict=True):
        assert replace(kept, answers=step.answers) == step
        assert list(kept.answers.group_ids) == list(step.answers.group_ids)
        resumed.update(kept.answers)
    got, want = trained(resumed), trained(whole)
    assert all(torch.equal(got[name], weight) for name, weight in want.items())
    assert not said


def test_the_settings_are_those_of_the_run_that_goes_on(
    made: Callable[..., Trainer], tmp_path: Path
) -> None:
    first = made(weight_decay=0.0, betas=(0.9, 0.999))
    first.update(answers(first.policy))
    checkpoint.save(tmp_path, first, Progress(1, 0, "run"), keep=1)
    second = made(weight_decay=0.3, betas=(0.5, 0.6))
    checkpoint.load(tmp_path, second, print)
    for group in second.optimizer.param_groups:
        assert (group["weight_decay"], group["betas"]) == (0.3, (0.5, 0.6))


def _two_ranks(rank: int, port: int, model: str, lora: bool, folder: str, resumed: bool) -> None:
    """Two updates and a checkpoint, or its loading and two more, on two gloo processes."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    ranks.join()
    torch.manual_seed(0)
    policy, _ = load_policy(ModelConfig(path=model, lora=LORA if lora else None), "cpu")
    scored = [answers(policy, seed) for seed in range(4)]
    policy.shard()
    trainer = trainer_of(policy)
    if resumed:
        checkpoint.load(Path(folder), trainer, print)
    for batch in scored[2:] if resumed else scored[:2]:
        trainer.update(batch)
    if not resumed:
        checkpoint.save(Path(folder), trainer, Progress(2, 2, "run"), keep=1)
    weights = dict(policy.named_weights())
    if rank == 0:
        torch.save(weights, Path(folder).with_suffix(".pt"))
    ranks.leave()


@pytest.mark.parametrize("lora", [False, True], ids=["every weight", "adapters"])
def test_two_sharded_processes_go_on_as_one_would(
    lora: bool, made: Callable[..., Trainer], tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    for resumed in (False, True):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        told = (port, str(tiny_model), lora, str(folder), resumed)
        torch.multiprocessing.spawn(_two_ranks, told, nprocs=2)
    got = torch.load(folder.with_suffix(".pt"))
    alone = made(LORA if lora else None)
    for batch in [answers(alone.policy, seed) for seed in range(4)]:
        alone.update(batch)
    for name, weight in alone.policy.named_weights():
        assert (got[name] - weight).abs().max() < 2e-4, name


def largest(folder: Path) -> Path:
    return max(folder.iterdir(), key=lambda file: file.stat().st_size)


def change_bytes(folder: Path) -> None:
    with largest(folder).open("r+b") as file:
        file.seek(1000)
        file.write(b"\0" * 64)


def cut(folder: Path) -> None:
    with largest(folder).open("r+b") as file:
        file.truncate(1000)


def lose_progress(folder: Path) -> None:
    (folder / "progress.json").unlink()


def change_progress(folder: Path) -> None:
    file = folder / "progress.json"
    file.write_text(file.read_text().replace('"step": 2', '"step": 3'))


@pytest.mark.parametrize("damage", [change_bytes, cut, lose_progress, change_progress])
def test_the_one_before_a_damaged_checkpoint_serves(
    damage: Callable[[Path], None], made: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = made()
    for step in (1, 2):
        trainer.update(answers(trainer.policy, step))
        checkpoint.save(tmp_path, trainer, Progress(step, step, "run"), keep=2)
        if step == 1:
            want = trained(trainer)
    damage(tmp_path / "step-000002")

    resumed, said = made(), list[str]()
    assert checkpoint.load(tmp_path, resumed, said.append) == Progress(1, 1, "run")
    got = trained(resumed)
    assert all(torch.equal(got[name], weight) for name, weight in want.items())
    (sentence,) = said
    assert "step-000002 is damaged" in sentence
    assert "kept as step-000002.damaged" in sentence
    # nothing is deleted, nor does the damaged one take the place of a good one
    checkpoint.save(tmp_path, resumed, Progress(2, 2, "run"), keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-000001", "step-000002", "step-000002.damaged"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(
    made: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = made()
    checkpoint.save(tmp_path, trainer, Progress(1, 1, "run"), keep=2)
    change_bytes(tmp_path / "step-000001")
    with pytest.raises(BadConfig, match="no checkpoint that is whole"):
        checkpoint.load(tmp_path, trainer, print)


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    with alone_in(tmp_path / "run"):
        with pytest.raises(BadConfig, match=r"is in use by a run \(process \d+\)"):
            alone_in(tmp_path / "run").__enter__()
        with alone_in(tmp_path / "another"):
            pass
    with alone_in(tmp_path / "run"):
        pass
