"""Runs a reward function in worker processes, next to everything else that a trainer does.

(Pebble's pool has the timeouts and survives crashes too; but a worker that is busy goes on for ever
when the trainer is killed, and so does what a worker started when that worker is ended.)
"""

from __future__ import annotations

import atexit
import contextlib
import inspect
import json
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from trainer_bridge.errors import RewardFunctionUnusable
from trainer_bridge.tasks.rewards import (
    Async,
    Batched,
    Outcome,
    RewardConfig,
    RewardFailure,
    RewardFunction,
    timed_out,
    work,
)

_ASYNC_GRACE_S = 1.0  # for a worker to report its timeouts itself, before it counts as blocked


class RewardRunner:
    """Scores answers in worker processes. Use as a context manager, or call `close`.

    Raises TypeError for a function that cannot be sent to another process or is declared as what
    it is not, RewardFunctionUnusable when a worker cannot load it.
    """

    def __init__(self, reward: RewardFunction, config: RewardConfig | None = None) -> None:
        self.config = config or RewardConfig()
        self._reward = _pickled(reward)
        self._size = reward.size if isinstance(reward, Batched | Async) else 1
        if self._size < 1:
            raise ValueError(f"size must be at least 1, not {self._size}")
        grace_s = _ASYNC_GRACE_S if isinstance(reward, Async) else 0.0
        self._deadline_s = self.config.timeout_s + grace_s
        self._waiting: deque[_Item] = deque()
        self._changed = threading.Condition()
        self._closed = False
        # a message that nobody reads wakes every thread that waits for its worker or for it
        self._closing, self._close = multiprocessing.Pipe(duplex=False)
        started: list[Future[None]] = [Future() for _ in range(self.config.workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(future,), daemon=True) for future in started
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)
        try:
            for future in started:
                future.result()
        except BaseException:
            self.close()
            raise

    def submit(self, problem: Any, answers: Sequence[str]) -> Future[list[Outcome]]:
        """Score all answers to one problem; the result has one entry per answer, in order.

        Blocks while `max_waiting` answers wait. Raises what pickling the problem raises, and
        RuntimeError after `close`.
        """
        group = _Group(len(answers))
        pickled = pickle.dumps(problem)
        items = [_Item(pickled, answer, group, i) for i, answer in enumerate(answers)]
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or len(self._waiting) < self.config.max_waiting
            )
            if self._closed:
                raise RuntimeError("the reward runner is closed")
            self._waiting.extend(items)
            self._changed.notify_all()
        return group.future

    def close(self) -> None:
        """End all workers, now. The results that are missing become CancelledError."""
        with self._changed:
            if not self._closed:
                self._close.send_bytes(b"closed")
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for item in self._waiting:
            item.group.fail(CancelledError())
        atexit.unregister(self.close)

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # One thread per worker, which alone starts, feeds and ends it.

    def _serve(self, started: Future[None]) -> None:
        worker = _Worker(self._reward, self.config, self._closing)
        try:
            worker.start()
        except Exception as error:
            worker.end()
            started.set_exception(error)
            return
        started.set_result(None)
        while items := self._take():
            try:
                for item, outcome in self._score(worker, items):
                    item.group.set(item.position, outcome)
            except Exception as error:  # _Closed, or a bug: never a result that does not come
                worker.end()
                for item in items:
                    item.group.fail(CancelledError() if isinstance(error, _Closed) else error)
        worker.end()

    def _take(self) -> list[_Item]:
        """As many waiting answers as fit one call, at least one; none after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting)
            if self._closed:
                return []
            count = min(self._size, len(self._waiting))
            self._changed.notify_all()
            return [self._waiting.popleft() for _ in range(count)]

    def _score(self, worker: _Worker, items: list[_Item]) -> Iterator[tuple[_Item, Outcome]]:
        """Every item with its outcome, as they come. The worker may be ended on the way."""
        left = dict(enumerate(items))
        try:
            worker.start()
            worker.send([(item.problem, item.answer) for item in items])
            deadline = time.monotonic() + self._deadline_s
            while left:
                index, outcome = worker.receive(deadline)
                yield left.pop(index), outcome
            return
        except _Late:
            worker.end()
            failure = timed_out(self.config.timeout_s)
        except _Died:
            failure = RewardFailure("crashed", worker.end(wait_s=1.0))
        except RewardFunctionUnusable as error:
            failure = RewardFailure("crashed", str(error))
        for item in left.values():
            yield item, failure


class _Group:
    """The answers of one `submit`, whose threads may set outcomes at the same time."""

    def __init__(self, count: int) -> None:
        self.future: Future[list[Outcome]] = Future()
        self.future.set_running_or_notify_cancel()  # a caller cannot cancel it under our hands
        self._outcomes: dict[int, Outcome] = {}
        self._count = count
        self._lock = threading.Lock()
        if not count:
            self.future.set_result([])

    def set(self, position: int, outcome: Outcome) -> None:
        with self._lock:
            self._outcomes[position] = outcome
            if len(self._outcomes) == self._count and not self.future.done():
                self.future.set_result([self._outcomes[i] for i in range(self._count)])

    def fail(self, error: BaseException) -> None:
        with self._lock:
            if not self.future.done():
                self.future.set_exception(error)


@dataclass(frozen=True)
class _Item:
    """One answer to score. The problem is pickled: only the call itself can fail over it."""

    problem: bytes
    answer: str
    group: _Group
    position: int


def _pickled(reward: RewardFunction) -> bytes:
    if not isinstance(reward, Async):
        function = reward.function if isinstance(reward, Batched) else reward
        if inspect.iscoroutinefunction(function):
            raise TypeError(f"{function!r} is a coroutine function: declare it as Async(...)")
    try:
        return pickle.dumps(reward)
    except Exception as error:
        raise TypeError(
            f"{reward!r} cannot be sent to a worker process ({error}); reward functions stand at "
            "the top of a module, or are methods of objects that can be pickled"
        ) from error


class _Closed(Exception):
    """The runner was closed while this thread waited."""


class _Late(Exception):
    """The worker said nothing before the deadline."""


class _Died(Exception):
    """The worker is gone."""


class _Worker:
    """One worker process at a time. What it says is JSON: nothing of it is unpickled here."""

    def __init__(self, reward: bytes, config: RewardConfig, closing: Connection) -> None:
        self._reward = reward
        self._config = config
        self._closing = closing
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection

    def start(self) -> None:
        """Return when a worker is ready, the present one or a new one."""
        if self._process is not None and self._process.is_alive():
            return
        self.end()
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, self._reward, self._config))
        try:
            self._process.start()
        except (OSError, RuntimeError) as error:  # no memory, no file descriptors, no main guard
            self._process = None
            raise RewardFunctionUnusable(f"cannot start a worker: {error}") from error
        theirs.close()
        try:
            _, said = self.receive(time.monotonic() + self._config.start_timeout_s)
        except _Late:
            self.end()
            limit = f"{self._config.start_timeout_s:g} s"
            raise RewardFunctionUnusable(f"the worker was not ready after {limit}") from None
        except _Died:
            raise RewardFunctionUnusable(
                f"while loading it, {self.end(wait_s=1.0)}; a worker runs the script that "
                'started it again, except what stands under `if __name__ == "__main__":`'
            ) from None
        if isinstance(said, RewardFailure):
            self.end()
            raise RewardFunctionUnusable(f"the worker cannot load it: {said.message}")

    def send(self, calls: list[tuple[bytes, str]]) -> None:
        try:
            self._connection.send(calls)
        except OSError as error:
            raise _Died from error

    def receive(self, deadline: float) -> tuple[int, Outcome]:
        """The position of a call, and its outcome. deadline: of time.monotonic()."""
        ready = wait([self._connection, self._closing], max(0.0, deadline - time.monotonic()))
        if self._closing in ready:
            raise _Closed
        if not ready:
            raise _Late
        try:
            index, said = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise _Died from error
        return index, said if isinstance(said, float) else RewardFailure(*said)

    def end(self, wait_s: float = 0.0) -> str:
        """End the worker, if there is one, and what it started. Says how it ended.

        wait_s: to wait first for a worker that is ending by itself.
        """
        if self._process is None:
            return "there was no worker"
        process, self._process = self._process, None
        process.join(wait_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join()
        self._connection.close()
        code = process.exitcode or 0
        if code < 0:
            return f"the worker was killed by {signal.Signals(-code).name}"
        return f"the worker ended with exit status {code}"
