"""What would end a run later is refused before it begins, with the setting, its value and why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import toys
from helpers.toys import Letters, Question

from ead_cli import train
from ead_sampler import device
from trainer_bridge.errors import BadConfig
from trainer_bridge.run.config import read_config
from trainer_bridge.run.start_checks import build_task, check_evaluation, check_run

# The longer the schedule is hot, the more the mean lowers it, in the end below what is allowed.
LATE = "{tau_max=1.2, tau_min=0.02, decay=25, mean_matched={temperature=0.5, tokens=200}}"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["rollout.max_new_tokens=100", "rollout.overlong_buffer=101"],
            r"rollout.overlong_buffer must be at most rollout.max_new_tokens, 100, got 101",
        ),
        (["rollout.annealing={tau_max=11}"], r"rollout.annealing.tau_max: must be .*, got 11"),
        (["rollout.annealing={schedule='none'}"], r"rollout.annealing.schedule: must be one of"),
        (
            [
                f"rollout.annealing={LATE}",
                "steps=1000",
            ],
            r"rollout.annealing.mean_matched.temperature: at step \d+: ",
        ),
        (
            [
                f"evaluation.annealing={LATE}",
            ],
            r"evaluation.annealing.mean_matched.temperature: at step \d+: ",
        ),
        (
            ["evaluation.annealing={schedule='constant', tau=20}"],
            r"evaluation.annealing.tau: must be .*, got 20",
        ),
        (
            ["rollout.sampling={temperature=0.7}"],
            r"rollout.sampling.temperature: must be absent or 1 .*, got 0.7",
        ),
        (["rollout.sampling={top_k=1}"], r"rollout.sampling.top_k: must not be 1"),
        (
            ["model.attention=flash_attention_2"],
            r"model.attention 'flash_attention_2' takes no float32: set model.compute_dtype=",
        ),
        (["evaluation.reward_range=[1, 0]"], r"evaluation: reward_range: 1.0 is above 0.0"),
        (["evaluation.problems=0"], r"evaluation.problems: .*greater than or equal to 1, got 0"),
    ],
)
def test_settings_that_cannot_be_run_are_refused_when_they_are_read(
    arguments: list[str], says: str
) -> None:
    with pytest.raises(BadConfig, match=says):
        read_config(arguments)


def test_a_schedule_is_checked_for_the_steps_of_the_run_alone() -> None:
    read_config([f"rollout.annealing={LATE}", "steps=2"])
    read_config(["rollout.annealing={preset='paper'}", "steps=100000"])
    read_config(["evaluation.annealing={preset='paper', step=3}"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["task.parameters={dataset='nope'}"],
            r"task.parameters: reasoning-gym refuses nope: .*not registered",
        ),
        (
            ["task.parameters={dataset='products', eval_share=2.0}"],
            r"task.parameters.eval_share: Input should be less than 1, got 2.0",
        ),
        (["task.kind=math"], r"task.parameters.path: Field required"),
        (
            ["task.kind=math", "task.parameters={path='none.jsonl'}"],
            r"task.kind 'math': FileNotFoundError: .*none.jsonl",
        ),
        (["task.kind=no_such:Task"], r"task.kind 'no_such:Task': ModuleNotFoundError: "),
        (["task.kind=json:dumps"], r"task.kind 'json:dumps': TypeError: .*missing 1 required"),
    ],
)
def test_a_task_that_cannot_be_made_is_said_with_its_setting(
    arguments: list[str], says: str
) -> None:
    with pytest.raises(BadConfig, match=says):
        build_task(read_config(arguments).task)


def test_a_tracker_that_is_not_installed_is_refused() -> None:
    config = read_config(["report.tracker=wandb"])
    with pytest.raises(BadConfig, match=r"report.tracker 'wandb' is not installed: pip install"):
        check_run(config, Letters())


class Finite(Letters):
    """Of a user: so many problems to train on, and for evaluation."""

    def __init__(self, train: int = 1 << 40, held_out: int = 1 << 40) -> None:
        self.ends = {"train": train, "eval": held_out}

    def problem(self, index: int, split: str = "train") -> Question:
        if index >= self.ends[split]:
            raise IndexError(index)
        return super().problem(index, split)


class OneFile(Letters):
    """Of a user: the same problems for both."""

    def problem(self, index: int, split: str = "train") -> Question:
        return Question(index, f"question {index}")


@pytest.mark.parametrize(
    ("task", "arguments", "says"),
    [
        (Finite(train=7), ["steps=1"], "letters has 7 problems .*prompts_per_step 8, which need 8"),
        (Finite(train=799), ["steps=100"], "has 799 problems .* steps 100 .* which need 800"),
        (Finite(train=10), ["seed=1"], "has 0 problems from problem 1048576 on .*seed 1"),
        (
            Finite(held_out=12),
            ["evaluate_every=1", "evaluation.problems=13"],
            "evaluation.problems 13: letters has 12",
        ),
        (Finite(held_out=0), ["evaluate_every=1"], "letters has no problem for evaluation"),
        (OneFile(), ["evaluate_every=1"], "letters asks training problem 0 in evaluation"),
        (toys.AllTooLong(), ["evaluate_every=1"], "asks the same in evaluation problem 1"),
    ],
)
def test_a_task_that_is_too_small_for_the_run_is_refused(
    task: Any, arguments: list[str], says: str
) -> None:
    with pytest.raises(BadConfig, match=says):
        check_run(read_config(arguments), task)


@pytest.mark.parametrize(("share", "what"), [(1e-9, "evaluation"), (1 - 1e-9, "training")])
def test_a_share_that_leaves_nothing_is_refused(share: float, what: str) -> None:
    settings = "{min_digits=1, max_digits=1}"
    parameters = f"{{dataset='products', settings={settings}, eval_share={share}}}"
    config = read_config([f"task.parameters={parameters}", "evaluate_every=1"])
    says = f"task.parameters.eval_share .* has too few different questions for {what}"
    with pytest.raises(BadConfig, match=says):
        check_run(config, build_task(config.task))


def test_a_task_that_is_large_enough_is_not() -> None:
    check_run(read_config(["steps=100"]), Finite(train=800, held_out=0))
    check_run(read_config(["evaluate_every=1", "evaluation.problems=12"]), Finite(held_out=12))
    check_run(read_config(["evaluate_every=1"]), Finite(held_out=12))  # all of them
    check_run(read_config(["evaluate_every=1"]), read_config([]).task.build())
    check_evaluation(read_config([]).evaluation, Finite(train=0, held_out=1))


@pytest.mark.parametrize("command", ["train", "eval"])
def test_it_is_refused_before_a_server_is_started(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr(train, "server_for", started)
    file = tmp_path / "few.jsonl"
    rows = [{"problem": f"{i} + 1?", "answer": i + 1} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        f"model.path={tmp_path}",
        "task.kind=math",
        f"task.parameters={{path='{file}'}}",
        "evaluate_every=1",
        "evaluation.problems=40",
    ]
    folder = tmp_path / "run"
    commands: dict[str, Callable[[], None]] = {
        "train": lambda: train.run(arguments, folder, resume=False),
        "eval": lambda: train.run_evaluation(arguments, folder, as_json=True),
    }
    with pytest.raises(BadConfig, match=r"evaluation.problems 40: math/few has \d;"):
        commands[command]()


# --- a server of the run's own --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_cpu", "flags"),
    [
        (True, ["--dtype", "float32"]),
        (False, ["--dtype", "bfloat16", "--mem-fraction-static", "0.4"]),
    ],
)
def test_a_server_beside_the_trainer_leaves_it_room_and_computes_as_its_device_can(
    on_cpu: bool, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the settings say comes last, and so counts."""

    class Stopped(Exception):
        pass

    def started(arguments: list[str], *_: Any, **__: Any) -> None:
        seen.append(arguments)
        raise Stopped

    seen: list[list[str]] = []
    monkeypatch.setattr(train, "ServerProcess", started)
    monkeypatch.setattr(device, "choose", lambda: "")
    monkeypatch.setattr(device, "is_cpu", lambda: on_cpu)
    config = read_config(["server.arguments=['--dtype', 'float16']"]).server
    with pytest.raises(Stopped), train.server_for(config, "model", tmp_path, print):
        pass
    assert seen[0][:2] == ["--model-path", "model"]
    assert seen[0][4:] == [*flags, "--dtype", "float16"]
