"""A version names the run that published it: another run's answers are nobody else's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.toys import Letters
from helpers.weights import post_sglang
from rich.console import Console

from ead_cli.train import RemoteServer
from ead_client import Client
from trainer_bridge.errors import StaleRollout
from trainer_bridge.run.collect import Collector, RolloutConfig
from trainer_bridge.run.config import read_config
from trainer_bridge.run.loop import train
from trainer_bridge.run.report import Display
from trainer_bridge.run.versions import Versions, new_run_id
from trainer_bridge.tasks.reward_runner import RewardRunner
from trainer_bridge.tasks.rewards import RewardConfig


def test_a_version_is_of_one_run_and_one_step() -> None:
    ours = Versions("a1b2c3d4")
    assert ours.name(7) == "a1b2c3d4:7"
    assert ours.step("a1b2c3d4:7") == 7
    assert ours.step("a1b2c3d4:0") == 0
    foreign = ["7", "default", "", ":7", "a1b2c3d4", "a1b2c3d4:", "a1b2c3d5:7", "unnamed-0:7"]
    foreign += ["a1b2c3d4:7x", "a1b2c3d4:-1", "a1b2c3d4:07", "a1b2c3d4:\u0667", "x:a1b2c3d4:7"]
    assert [ours.step(version) for version in foreign] == [None] * len(foreign)
    assert len({new_run_id() for _ in range(100)}) == 100


@pytest.fixture
def restored(client: Client, tiny_model: Path) -> Iterator[None]:
    yield
    assert post_sglang(client, tiny_model, weight_version="default").json()["success"]


@pytest.mark.parametrize("version", ["other:3", "3", None])
def test_the_same_step_of_another_run_is_refused(
    version: str | None, client: Client, tiny_model: Path, restored: None
) -> None:
    """Two trainers on one server: only what the second one published is there, at the same step."""
    from transformers import AutoTokenizer

    sized = {"prompts_per_step": 1, "samples_per_prompt": 2, "max_new_tokens": 4}
    with RewardRunner(Letters().reward, RewardConfig(workers=1)) as runner:
        collector = Collector(
            RolloutConfig.model_validate(sized),
            client,
            Letters(),
            runner,
            AutoTokenizer.from_pretrained(tiny_model),
            Versions("ours"),
        )
        more = {} if version is None else {"weight_version": version}
        assert post_sglang(client, tiny_model, **more).json()["success"]
        with pytest.raises(StaleRollout, match=r"run ours, step 3 wants weights of version 3, an"):
            collector.collect(3, 0)
        assert post_sglang(client, tiny_model, weight_version="ours:3").json()["success"]
        assert len(collector.collect(3, 0).answers.samples) == 2


def test_a_run_that_goes_on_keeps_its_name_and_another_has_another(
    client: Client, tiny_model: Path, tmp_path: Path, restored: None
) -> None:
    def run(folder: str, steps: int, *, resume: bool = False) -> str:
        config = read_config(
            [
                f"model.path={tiny_model}",
                "task.kind=helpers.toys:Letters",
                f"steps={steps}",
                "rollout.prompts_per_step=2",
                "rollout.samples_per_prompt=2",
                "rollout.max_new_tokens=6",
                "reward.workers=1",
                "checkpoint.every=1",
                "report.tensorboard=false",
            ]
        )
        with Display(Console(stderr=True), config.steps) as display:
            train(config, tmp_path / folder, RemoteServer(client, 60), display, resume=resume)
        run_id, step = client.model_info()["weight_version"].split(":")
        assert step == str(steps)
        newest = max((tmp_path / folder / "checkpoints").iterdir())
        assert json.loads((newest / "progress.json").read_text())["run_id"] == run_id
        return str(run_id)

    first = run("first", 1)
    assert run("first", 2, resume=True) == first
    assert run("second", 1) != first
