"""How `ead serve` ends: in time, with what it has begun, whether it was ready yet or not.

Told to end by SIGTERM or SIGINT, each process that answers HTTP takes nothing new (`state`), and
waits for its calls in progress. What is not done after `drain_seconds` is aborted, and its clients
get what was generated, with the finish reason "abort". Then SGLang's scheduler is told to give back
what it holds. Some waits have no end of their own: a request at a paused engine, an upload that
trickles, a client that does not read. So the process ends, with all that it started, at the latest
ABORT_SECONDS + RELEASE_SECONDS after that. A second SIGINT ends it at once.

Until the model is loaded there is nothing to finish, and the process ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from ead_server.asgi import Message, Receive
from ead_server.lifecycle import state, watch
from ead_server.settings import current

ABORT_SECONDS = 3.0  # for answers that were aborted to reach their clients
RELEASE_SECONDS = 3.0  # for the scheduler to give back memory, and connections to close


class _Ending:
    """Of this process; all of it belongs to the event loop."""

    def __init__(self) -> None:
        self.calls = 0  # of clients, in progress
        self.told = False
        self.drained = asyncio.Event()
        self.stop_uvicorn: Callable[[int, Any], Any] | None = None
        self.task: asyncio.Task[None] | None = None


_ending = _Ending()


def while_it_loads() -> None:
    """A signal ends this process through its `finally`, and so its children, until the event loop
    takes it; by default it would leave them, and do nothing in a container."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))


def when_supervised() -> None:
    """uvicorn's supervisor of several tokenizer workers waits for them without end, deaf to a
    second SIGINT; and it has taken the SIGQUIT by which SGLang hears that its engine is gone."""
    from uvicorn.supervisors import Multiprocess

    tell_workers = Multiprocess.terminate_all

    def in_time(self: Multiprocess) -> None:
        signal.signal(signal.SIGINT, lambda *_: end_now(128 + signal.SIGINT))
        _end_at_the_latest(1.0)  # they themselves end before that
        tell_workers(self)

    Multiprocess.terminate_all = in_time  # type: ignore[method-assign]
    # the supervisor looks its handlers up by the signal's name
    Multiprocess.handle_quit = lambda _: end_now(1)  # type: ignore[attr-defined]


def from_start_to_end(receive: Receive) -> Receive:
    """The app's lifespan events, which uvicorn sends once it has taken the signals, and once it has
    finished with all clients.

    A server that is not ready yet does not return from its last: SGLang would wait for its warm-up,
    whose requests nobody answers any more, two minutes, or with several workers twelve.
    """

    async def received() -> Message:
        message = await receive()
        if message["type"] == "lifespan.startup":
            _listen()
        elif message["type"] == "lifespan.shutdown" and state.starting():
            end_now(0)
        return message

    return received


@contextlib.contextmanager
def call_in_progress() -> Iterator[None]:
    """Around each call of a client: the end waits for it."""
    _ending.calls += 1
    try:
        yield
    finally:
        _ending.calls -= 1


def end_now(status: int) -> NoReturn:
    """This process and all that it has started, without waiting for anything."""
    from sglang.srt.utils import kill_process_tree

    from ead_server.weights.update import spool_prefix

    watch.stand_down()
    with contextlib.suppress(Exception):
        kill_process_tree(os.getpid(), include_parent=False, wait_timeout=3)
    for folder in Path(tempfile.gettempdir()).glob(spool_prefix(os.getpid()) + "*"):
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(status)


# --- draining ------------------------------------------------------------------------------------


def _listen() -> None:
    if threading.current_thread() is not threading.main_thread():
        return  # signals are another's, as in a trainer that runs a server in a thread
    handler = signal.getsignal(signal.SIGINT)
    _ending.stop_uvicorn = handler if callable(handler) else None
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _told_to_end, number)


def _told_to_end(number: int) -> None:
    if _ending.told:
        if number == signal.SIGINT:
            end_now(128 + number)
        return
    _ending.told = True
    manager = state.manager()
    if manager is not None:
        manager.gracefully_exit = True  # SGLang's own flag, which `state` reads too
    _end_at_the_latest()
    _ending.task = asyncio.get_running_loop().create_task(_drain(manager))


def _end_at_the_latest(more: float = 0.0) -> None:
    settings = current()
    assert settings is not None
    seconds = settings.drain_seconds + ABORT_SECONDS + RELEASE_SECONDS + more
    timer = threading.Timer(seconds, end_now, (0,))
    timer.daemon = True
    timer.start()


async def _drain(manager: Any | None) -> None:
    settings = current()
    assert settings is not None
    deadline = time.monotonic() + settings.drain_seconds
    while _busy(manager) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    while _busy(manager) and time.monotonic() < deadline + ABORT_SECONDS:
        if manager is not None:
            manager.abort_request(abort_all=True)  # again: some were still queued
        await asyncio.sleep(0.5)
    if state.starting():
        end_now(0)
    if _sglang_ends(manager):
        _ending.drained.set()
    elif _ending.stop_uvicorn is not None:
        _ending.stop_uvicorn(signal.SIGINT, None)


def _busy(manager: Any | None) -> bool:
    """Whether anything is in progress that somebody waits for.

    Of a server that starts, SGLang's own first request is not.
    """
    from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

    from ead_server.weights.update import served_weights

    weights = served_weights()
    if _ending.calls or (weights is not None and weights.updating is not None):
        return True
    if manager is None or state.starting():
        return False
    # /v1/rollouts goes on for clients that left, if they gave it a key
    return any(not str(rid).startswith(HEALTH_CHECK_RID_PREFIX) for rid in manager.rid_to_state)


def _sglang_ends(manager: Any | None) -> bool:
    """Whether SGLang ends this process by itself: once it has generated, and where it has the
    scheduler for itself. Other workers of several are still at work with it."""
    from sglang.srt.managers.multi_tokenizer_mixin import TokenizerWorker

    began = manager is not None and manager.event_loop is not None
    return began and not isinstance(manager, TokenizerWorker)


# --- hooks, see ead_server.hooks ----------------------------------------------------------------


def sigterm(result: None, handler: Any, *received: Any) -> None:
    """AFTER SignalHandler.sigterm_handler, which takes SIGTERM when SGLang first generates."""
    if current() is not None:
        _told_to_end(signal.SIGTERM)


def sigquit(original: Callable[..., None], handler: Any, *received: Any) -> None:
    """AROUND SignalHandler.running_phase_sigquit_handler: a process of the engine is gone."""
    if current() is None:
        original(handler, *received)
        return
    handler.tokenizer_manager.dump_requests_before_crash()  # only where the user asked for it
    end_now(1)


async def drain(original: Callable[..., Awaitable[None]], manager: Any) -> None:
    """AROUND TokenizerManager.sigterm_watchdog, which waits without end, ends at once after a
    failed health check, and takes the scheduler with it."""
    if current() is not None:
        await _ending.drained.wait()
        watch.stand_down()
        manager.rid_to_state.clear()  # who is left could not be aborted: SGLang would wait for them
    await original(manager)
