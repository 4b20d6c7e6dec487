"""What holds for requests that do not say: the server's default schedule and training step.

The default schedule is that of start-up (`ead serve --annealing`, or EAD_ANNEALING) until another
is set. What is set is in memory shared by all processes that answer HTTP
(`--tokenizer-worker-num`), since a weight update or a new setting reaches only one of them.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
from functools import lru_cache
from typing import Any

from ead_sampler.schedules import PRESETS, REGISTRY, AnnealingError, check_all_steps

DEFAULT_ANNEALING = "EAD_ANNEALING"  # environment: JSON of a schedule, or its name

_NUMBERS = 3  # int64: training step + 1, weight updates, version of the schedule
_SLOT = 1 << 16  # bytes of a schedule's JSON, padded with spaces


class SharedDefaults:
    """The step s of schedules whose request names none, and the default schedule, if it was set.

    path: of memory that another process made (its `path`); None makes new. It is an anonymous
    file, so it goes when its last process goes, however that ends.
    """

    def __init__(self, path: str | None = None) -> None:
        if path is None:
            self._file = os.memfd_create("ead-defaults")
            os.ftruncate(self._file, 8 * _NUMBERS + 2 * _SLOT)
            path = f"/proc/{os.getpid()}/fd/{self._file}"
        else:
            self._file = os.open(path, os.O_RDWR)
        self.path = path
        memory = memoryview(mmap.mmap(self._file, 8 * _NUMBERS + 2 * _SLOT))
        self._numbers = memory[: 8 * _NUMBERS].cast("q")
        self._slots = memory[8 * _NUMBERS :]

    @property
    def step(self) -> int:
        """In effect now: the one set, else the weight updates."""
        return self.weight_updates if self.step_set_to is None else self.step_set_to

    @property
    def step_set_to(self) -> int | None:
        """The step that was set, or None while the weight updates count."""
        return self._numbers[0] - 1 if self._numbers[0] else None

    @step_set_to.setter
    def step_set_to(self, step: int | None) -> None:
        self._numbers[0] = 0 if step is None else step + 1

    @property
    def weight_updates(self) -> int:
        return int(self._numbers[1])

    def count_weight_update(self) -> None:
        """SGLang makes weight updates one at a time, so nothing is lost between processes."""
        self._numbers[1] += 1

    @property
    def schedule(self) -> str | None:
        """JSON of the schedule that was set (perhaps "null"); None while none was."""
        while version := self._numbers[2]:
            text = bytes(self._slot(version)).decode().rstrip()
            if self._numbers[2] == version:  # else it was being written over
                return text
        return None

    def set_schedule(self, text: str) -> None:
        """text: at most 65,536 bytes of JSON. Readers see it whole or not at all."""
        data = text.encode()
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            version = self._numbers[2] + 1
            self._slot(version)[:] = data + b" " * (_SLOT - len(data))
            self._numbers[2] = version
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _slot(self, version: int) -> memoryview:
        start = version % 2 * _SLOT
        return self._slots[start : start + _SLOT]


_PATH = "EAD_SHARED_DEFAULTS"  # environment: SharedDefaults.path of the server's first process
_shared: SharedDefaults | None = None


def shared_defaults() -> SharedDefaults:
    """This server's. Made on first use in the process that starts the server."""
    global _shared
    if _shared is None:
        _shared = SharedDefaults()
        os.environ[_PATH] = _shared.path
    return _shared


def join_shared_defaults() -> None:
    """In a further process of the same server: use those of the process that started it."""
    global _shared
    _shared = SharedDefaults(os.environ[_PATH])


def default_annealing() -> dict[str, Any] | None:
    """The server's default schedule, as a request would send it. Raises AnnealingError."""
    text = None if _shared is None else _shared.schedule
    return _parsed(os.environ.get(DEFAULT_ANNEALING, "").strip() if text is None else text)


def with_step(raw: dict[str, Any]) -> dict[str, Any]:
    """A schedule as a client sent it, with the step in effect now if it names none."""
    return {**raw, "step": shared_defaults().step} if raw.get("step") is None else raw


def set_default_annealing(raw: dict[str, Any] | None) -> None:
    """Make this the default of all processes of the server. Raises AnnealingError."""
    if raw is not None:
        check_all_steps(raw)
    text = json.dumps(raw)
    if len(text) > _SLOT:
        raise AnnealingError("annealing", f"must have at most {_SLOT} bytes as JSON")
    shared_defaults().set_schedule(text)


@lru_cache(maxsize=1)
def _parsed(text: str) -> dict[str, Any] | None:
    if not text:
        return None
    if text in PRESETS or text in REGISTRY:
        return {"preset" if text in PRESETS else "schedule": text}
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise AnnealingError("annealing", f"is not valid JSON ({error}), got {text[:80]}") from None
    if raw is None:
        return None
    check_all_steps(raw)
    return dict(raw)
