"""Waiting for something to become true, in place of sleeping."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

SCALE = float(os.environ.get("EAD_TIMEOUT_SCALE", "1"))  # of every time-out of the tests


def wait_for(condition: Callable[[], object], timeout_s: float = 120.0) -> None:
    """Return when the condition holds. Fails after `timeout_s` seconds, scaled."""
    timeout_s *= SCALE
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s"
        time.sleep(0.02)
