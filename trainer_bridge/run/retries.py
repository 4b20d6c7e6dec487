"""What a server that went away interrupts is done again, until a time-out."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable
from typing import TypeGuard, TypeVar

from safetensors import SafetensorError

from ead_client import ConnectionFailed, EadError, RequestRefused, ServerUnavailable, TimedOut
from trainer_bridge.errors import BridgeError, StaleRollout, WeightUpdateFailed

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0  # seconds before an action is tried again


def retried(
    action: Callable[[], T],
    *,
    mend: Callable[[], None],
    timeout_s: float,
    say: Callable[[str], None],
) -> T:
    """The result of `action`; after a failure that may pass, `mend` and then `action` again.

    mend: may fail as the action may. Patience begins with a failure, and begins anew when an
    attempt lasted longer than it: what takes long has a second chance. The pause before an attempt
    doubles up to half a minute. Raises what the last attempt raised.
    """
    deadline, pause, failed = math.inf, FIRST_PAUSE, False
    while True:
        began = time.monotonic()
        try:
            if failed:
                mend()
            return action()
        except (EadError, BridgeError) as error:
            now = time.monotonic()
            if not failed or now - began > timeout_s:
                deadline, pause = now + timeout_s, FIRST_PAUSE
            if not may_pass(error) or now >= deadline:
                raise
            say(f"{type(error).__name__}: {error}; waiting for the server")
        failed = True
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(2 * pause, LONGEST_PAUSE)


def may_pass(error: BaseException | None) -> TypeGuard[BaseException]:
    """Whether it may be gone once the server is back, and has its weights."""
    if isinstance(error, WeightUpdateFailed):
        error = error.__cause__
    if isinstance(error, RequestRefused):
        # another update is in progress: of this run before it was killed
        return error.status == 409
    passing = ConnectionFailed | TimedOut | ServerUnavailable | StaleRollout
    return isinstance(error, passing) or _is_full_disk(error)


def _is_full_disk(error: BaseException | None) -> bool:
    """Where weights are written for the server."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, SafetensorError):  # has the system's error in its text alone
        return any(f"(os error {number})" in str(error) for number in numbers)
    return isinstance(error, OSError) and error.errno in numbers
