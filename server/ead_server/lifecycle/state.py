"""What this server is doing now: the one place that knows, and that all readers ask.

SGLang's own flags do not say it. Its `ServerStatus` is "UnHealthy" after one health check that
nobody answered in time, as in every long pause, until somebody asks for another.
"""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Any, NamedTuple


class State(StrEnum):
    """Of the whole server; only a ready one takes requests and answers them."""

    STARTING = "starting"
    READY = "ready"
    PAUSED = "paused"  # somebody paused generation
    UPDATING = "updating"  # new weights are coming, or are awaited since an update broke off
    DRAINING = "draining"  # told to end: finishes what it has begun, and takes nothing new
    STUCK = "stuck"  # the engine is silent though requests wait


class Status(NamedTuple):
    """The state, and in words why it is not `ready`."""

    state: State
    why: str


def in_short(why: str) -> str:
    """For who brings no key: without what went wrong, which may name folders of this machine."""
    return why.partition(":")[0]


def manager() -> Any | None:
    """SGLang's TokenizerManager of this process; None before it is up."""
    from sglang.srt.entrypoints.http_server import get_global_state

    state = get_global_state()
    return None if state is None else state.tokenizer_manager


def starting() -> bool:
    """Whether SGLang's first request, its warm-up, has not been answered yet."""
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    found = manager()
    return found is None or found.server_status == ServerStatus.Starting


def draining() -> bool:
    """Whether this process was told to end."""
    found = manager()
    return found is not None and bool(found.gracefully_exit)


def now() -> Status:
    """The state, looked at from the end backwards: a server that drains may also be paused."""
    from ead_server.weights.update import served_weights

    weights = served_weights()
    if draining():
        return Status(State.DRAINING, "shutting down")
    if weights is None:
        return Status(State.STARTING, "starting")
    if weights.standstill is not None:
        _stood_still_at[0] = time.time()
        paused = weights.broken is None and weights.updating is None
        return Status(State.PAUSED if paused else State.UPDATING, weights.standstill)
    if starting():
        return Status(State.STARTING, "starting")
    silent = _silent_for(weights.manager)
    if silent is not None:
        return Status(State.STUCK, f"the engine has answered nothing for {silent:.0f} s")
    return Status(State.READY, "ready")


_stood_still_at = [0.0]  # time.time() of the last look that found it so


def _silent_for(manager: Any) -> float | None:
    """Seconds for which the engine has kept those who wait without any sign of life, if they are
    too many. SGLang itself only looks when it is asked to generate for /health. In a standstill
    nobody expected one."""
    from sglang.srt.entrypoints.http_server import HEALTH_CHECK_TIMEOUT

    moment = time.perf_counter()
    waiting = [moment - s.time_stats.created_time for s in list(manager.rid_to_state.values())]
    heard_at = max(manager.last_receive_tstamp, _stood_still_at[0])
    silent = min(max(waiting, default=0.0), time.time() - heard_at)
    return silent if silent > HEALTH_CHECK_TIMEOUT else None
