"""Ctrl-C during a run: the first ends it after the step in progress, a second one at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interrupt:
    """Takes SIGINT while it is used as a context manager, in the main thread of each rank.

    The first SIGINT sets `asked`, for the run to look at between two steps; a second one raises
    KeyboardInterrupt. Rank 0 decides for all ranks: the others leave the first one to it.

    say: called with a line for the user at the first SIGINT; None on the ranks that say nothing.
    Without `enabled`, and outside the main thread, SIGINT does what it did before.
    """

    def __init__(self, say: Callable[[str], None] | None, *, enabled: bool) -> None:
        self.asked = False
        self.step = 0  # the one in progress
        self._say = say
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        if self._enabled:
            self._before = signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            signal.signal(signal.SIGINT, self._before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self._say is not None:
            line = f"finishing step {self.step + 1}, writing a checkpoint; press again to stop now"
            # by another thread: this one may be in the middle of printing something
            threading.Thread(target=self._say, args=(line,), daemon=True).start()
