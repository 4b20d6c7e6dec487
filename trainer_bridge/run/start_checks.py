"""What would end a run, or an evaluation, at its first step or a later one, found before it begins.

What the settings alone decide, TrainConfig refuses; here is what the task decides.
"""

from __future__ import annotations

from importlib.util import find_spec

from pydantic import ValidationError

from trainer_bridge.errors import BadConfig
from trainer_bridge.run.config import TrainConfig, in_words
from trainer_bridge.run.evaluate import EvaluationConfig, held_out, question
from trainer_bridge.tasks.task import Problem, Task, TaskConfig


def first_problem(seed: int) -> int:
    """The number of a run's first problem: other seeds see other problems."""
    return seed << 20


def build_task(config: TaskConfig) -> Task:
    """The task. Raises BadConfig for whatever keeps it from being made."""
    try:
        return config.build()
    except ValidationError as error:
        raise BadConfig(in_words(error, config.maker(), "task", "parameters")) from None
    except Exception as error:  # of a user's module, class or parameters
        raise BadConfig(f"task.kind {config.kind!r}: {type(error).__name__}: {error}") from error


def check_run(
    config: TrainConfig, task: Task, *, steps: int | None = None, first: int | None = None
) -> None:
    """Raises BadConfig for a task that has too few problems for the run, or asks in evaluation what
    it also trains on (as far as the first step shows), and for a tracker that is not installed.

    steps, first: of a run that goes on, how many steps are still to be asked for, and the number of
    the next problem.
    """
    steps = config.steps if steps is None else steps
    first = first_problem(config.seed) if first is None else first
    tracker = config.report.tracker
    if tracker is not None and find_spec(tracker) is None:
        raise BadConfig(f"report.tracker {tracker!r} is not installed: pip install {tracker}")
    per_step = config.rollout.prompts_per_step
    needed = steps * per_step
    if needed and not _has(task, first + needed - 1):
        there = _count(task, first, needed)
        raise BadConfig(
            f"task: {task.name} has {there} problems from problem {first} on (where seed "
            f"{config.seed} begins, or the run goes on), too few for steps {steps} of "
            f"rollout.prompts_per_step {per_step}, which need {needed}"
        )
    if config.evaluate_every:
        asked = {question(p) for p in check_evaluation(config.evaluation, task)}
        for index in range(first, first + min(needed, per_step)):
            if question(task.problem(index)) in asked:
                raise BadConfig(f"task: {task.name} asks training problem {index} in evaluation")


def check_evaluation(config: EvaluationConfig, task: Task) -> list[Problem]:
    """The problems for evaluation. Raises BadConfig for a task without so many, or with two that
    are one."""
    problems = held_out(task, config.problems)
    if config.problems is not None and len(problems) < config.problems:
        raise BadConfig(
            f"evaluation.problems {config.problems}: {task.name} has {len(problems)}; ask for at "
            "most so many, or leave the setting out"
        )
    return problems


def _has(task: Task, index: int) -> bool:
    try:
        task.problem(index)
    except IndexError:
        return False
    return True


def _count(task: Task, first: int, most: int) -> int:
    """How many problems there are from `first` on, if they are fewer than `most`."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if _has(task, first + middle) else (low, middle)
    return low
