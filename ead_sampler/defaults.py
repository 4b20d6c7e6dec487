"""What holds for requests that do not say: the server's default schedule and training step.

The default schedule is fixed at start-up (`ead serve --annealing`, or EAD_ANNEALING). The step is
two numbers in memory shared by all processes that answer HTTP (`--tokenizer-worker-num`), since a
weight update or a new step reaches only one of them.
"""

from __future__ import annotations

import json
import mmap
import os
from functools import lru_cache
from typing import Any

from ead_sampler.schedule import AnnealingError, parse_annealing

DEFAULT_ANNEALING = "EAD_ANNEALING"  # environment: JSON of a schedule


class TrainingStep:
    """The step s of schedules whose request names none: the one set, else the weight updates.

    path: of memory that another process made (its `path`); None makes new. It is an anonymous
    file, so it goes when its last process goes, however that ends.
    """

    def __init__(self, path: str | None = None) -> None:
        if path is None:
            self._file = os.memfd_create("ead-training-step")
            os.ftruncate(self._file, 16)
            path = f"/proc/{os.getpid()}/fd/{self._file}"
        else:
            self._file = os.open(path, os.O_RDWR)
        self.path = path
        self._numbers = memoryview(mmap.mmap(self._file, 16)).cast("q")  # step + 1, updates

    @property
    def set_to(self) -> int | None:
        """The step that was set, or None while the weight updates count."""
        return self._numbers[0] - 1 if self._numbers[0] else None

    @set_to.setter
    def set_to(self, step: int | None) -> None:
        self._numbers[0] = 0 if step is None else step + 1

    @property
    def weight_updates(self) -> int:
        return int(self._numbers[1])

    def count_weight_update(self) -> None:
        """SGLang makes weight updates one at a time, so nothing is lost between processes."""
        self._numbers[1] += 1

    @property
    def now(self) -> int:
        return self.weight_updates if self.set_to is None else self.set_to


_STEP_PATH = "EAD_TRAINING_STEP"  # environment: TrainingStep.path of the server's first process
_step: TrainingStep | None = None


def training_step() -> TrainingStep:
    """This server's step. Made on first use in the process that starts the server."""
    global _step
    if _step is None:
        _step = TrainingStep()
        os.environ[_STEP_PATH] = _step.path
    return _step


def join_training_step() -> None:
    """In a further process of the same server: use the step of the process that started it."""
    global _step
    _step = TrainingStep(os.environ[_STEP_PATH])


def default_annealing() -> dict[str, Any] | None:
    """The server's default schedule, as a request would send it. Raises AnnealingError."""
    return _parsed(os.environ.get(DEFAULT_ANNEALING, "").strip())


@lru_cache(maxsize=1)
def _parsed(text: str) -> dict[str, Any] | None:
    if not text:
        return None
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise AnnealingError("annealing", f"is not valid JSON ({error}), got {text[:80]}") from None
    if raw is None:
        return None
    parse_annealing(raw)
    return dict(raw)
