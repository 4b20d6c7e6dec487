"""Reward functions of any origin, run in worker processes while other answers are generated.

A function that hangs, raises, ends its process or returns no finite number costs the answers it was
given, and nothing else: each of them gets a `RewardFailure`, for the caller to drop and to count.
It never becomes a reward of 0.

Three forms, told apart by declared type:

    def reward(problem, answer: str) -> float           # plain: the function itself
    def rewards(problems, answers) -> list[float]       # Batched(rewards)
    async def reward(problem, answer: str) -> float     # Async(reward)

Workers are fresh interpreters: they import what the function needs and nothing of the trainer's
state, see no GPU, and end with the trainer however it ends. So a function must be importable (at
the top of a module, or a method of an object that can be pickled), and problems be picklable. A
script that defines its own function keeps its work under `if __name__ == "__main__":`, as always
with `multiprocessing`.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import math
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from pydantic import Field

from trainer_bridge.settings import Settings

_LARGEST = 1e15  # of a reward; its square is far from the largest float32, 3e38
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Batched:
    """A function that scores up to `size` answers, to several problems, in one call."""

    function: Callable[[Sequence[Any], Sequence[str]], Sequence[float]]
    size: int = 64


@dataclass(frozen=True)
class Async:
    """A coroutine function that scores one answer; a worker awaits up to `size` together."""

    function: Callable[[Any, str], Awaitable[float]]
    size: int = 64


RewardFunction = Callable[[Any, str], float] | Batched | Async


@dataclass(frozen=True)
class RewardFailure:
    """Why an answer has no reward."""

    kind: Literal["timed_out", "raised", "crashed", "not_finite", "wrong_count"]
    message: str


Outcome = float | RewardFailure  # the float is finite


class RewardConfig(Settings):
    """How a reward function is run."""

    workers: int = Field(default=2, ge=1, le=1024, description="processes")
    timeout_s: float = Field(
        default=30.0,
        gt=0,
        le=86_400,
        description="seconds a call may take; then its worker is ended",
    )
    start_timeout_s: float = Field(
        default=120.0,
        gt=0,
        le=86_400,
        description="seconds a worker may take to import the function",
    )
    max_waiting: int = Field(
        default=4096,
        ge=1,
        description="answers that wait for a worker; at this many, `submit` blocks",
    )
    max_memory_gib: float | None = Field(
        default=8.0, gt=0, le=2**20, description="address space of each worker, GiB; None: no limit"
    )


def timed_out(timeout_s: float) -> RewardFailure:
    return RewardFailure("timed_out", f"no reward within {timeout_s:g} s")


# --- in the worker process -----------------------------------------------------------------------


def work(connection: Connection, pickled: bytes, config: RewardConfig) -> None:
    """A worker's life: load the function, then score what comes until the trainer is gone."""

    def say(index: int, outcome: Outcome) -> None:
        said: Any = outcome
        if isinstance(outcome, RewardFailure):
            said = outcome.kind, outcome.message
        connection.send_bytes(json.dumps([index, said]).encode())

    try:
        _set_apart(config.max_memory_gib)
        reward: RewardFunction = pickle.loads(pickled)
    except BaseException as error:
        return say(0, _raised(error))
    say(0, 0.0)
    with asyncio.Runner() as runner:
        while True:
            try:
                calls: list[tuple[bytes, str]] = connection.recv()
            except EOFError:
                return
            if isinstance(reward, Async):
                runner.run(_score_together(reward, calls, config.timeout_s, say))
            elif isinstance(reward, Batched):
                for index, outcome in enumerate(_score_batch(reward, calls)):
                    say(index, outcome)
            else:
                for index, (problem, answer) in enumerate(calls):
                    say(index, _score_one(reward, problem, answer))


def _set_apart(max_memory_gib: float | None) -> None:
    """A process group to be ended as a whole, no GPU, limited memory, and no life of its own."""
    os.setsid()
    if sys.platform == "linux":
        # By the kernel, since a loop inside C code would not let a thread of ours look. It ends
        # with the thread that started it, which lives as long as the runner.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    trainer = multiprocessing.parent_process()
    if trainer is None or os.getppid() != trainer.pid:
        os._exit(1)  # it died before the line above
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash costs an answer, not the disk
    if max_memory_gib is not None:
        set_before = resource.getrlimit(resource.RLIMIT_AS)  # by `ulimit -v`, for example
        wanted = int(max_memory_gib * 2**30)
        limit = min([wanted, *(old for old in set_before if old != resource.RLIM_INFINITY)])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _score_one(function: Callable[[Any, str], float], problem: bytes, answer: str) -> Outcome:
    try:
        return _checked(function(pickle.loads(problem), answer))
    except BaseException as error:  # also SystemExit
        return _raised(error)


def _score_batch(reward: Batched, calls: list[tuple[bytes, str]]) -> list[Outcome]:
    try:
        problems = [pickle.loads(problem) for problem, _ in calls]
        returned = reward.function(problems, [answer for _, answer in calls])
        if isinstance(returned, Mapping | Set | str | bytes) or getattr(returned, "ndim", 1) != 1:
            message = f"a {type(returned).__name__} is no sequence of rewards: {returned!r:.200}"
            return [RewardFailure("not_finite", message)] * len(calls)
        rewards = list(returned)
        if len(rewards) != len(calls):
            message = f"{len(rewards)} rewards for {len(calls)} answers"
            return [RewardFailure("wrong_count", message)] * len(calls)
        return [_checked(value) for value in rewards]
    except BaseException as error:
        return [_raised(error)] * len(calls)


async def _score_together(
    reward: Async,
    calls: list[tuple[bytes, str]],
    timeout_s: float,
    say: Callable[[int, Outcome], None],
) -> None:
    async def score(index: int, problem: bytes, answer: str) -> None:
        clock = asyncio.timeout(timeout_s)
        try:
            async with clock:
                outcome = _checked(await reward.function(pickle.loads(problem), answer))
        except BaseException as error:
            outcome = timed_out(timeout_s) if clock.expired() else _raised(error)
        say(index, outcome)

    await asyncio.gather(*(score(index, *call) for index, call in enumerate(calls)))


def _checked(value: Any) -> Outcome:
    """The value as a finite float: of Python, numpy or torch, but never a text."""
    # numpy's texts have a __float__ that reads them
    text = isinstance(value, str | bytes) or _numpy_kind(value) not in "biuf"
    if text or not hasattr(type(value), "__float__") or not math.isfinite(number := float(value)):
        return RewardFailure("not_finite", f"{value!r:.200} is not a finite number")
    if abs(number) > _LARGEST:
        message = f"{value!r:.200} is not finite in float32, squared and summed over a batch"
        return RewardFailure("not_finite", message)
    return number


def _numpy_kind(value: Any) -> str:
    kind = getattr(getattr(value, "dtype", None), "kind", "f")
    return kind if isinstance(kind, str) else "f"


def _raised(error: BaseException) -> RewardFailure:
    what = "".join(traceback.format_exception_only(error)).strip()
    where = traceback.extract_tb(error.__traceback__)[-1]
    return RewardFailure("raised", f"{what:.2000} ({where.filename}:{where.lineno})")
