"""Sees within seconds that a process of the server died or was stopped, and ends the server.

A thread in each process looks once a second at its parent and its children, two rules in all:
a relative that is stopped (SIGSTOP) is killed; a relative that is dead ends this process. So it
spreads through the whole family, and clients see closed connections rather than silence.

The clock is this process's own running time: a Ctrl-Z that stops all of them stops the counting.
A debugger's stop is another state, and is left alone. uvicorn's supervisor of several tokenizer
workers replaces a dead one, which therefore ends nobody.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

LOOK_SECONDS = 1.0
LOOKS = 4  # at a stopped process, one after the other, before it is killed
# by the titles that SGLang gives them: without any of these no request is answered
_ENGINE = ("sglang::scheduler", "sglang::detokenizer", "sglang::data_parallel_controller")


class StoppedProcesses:
    """Counts looks at processes, and kills those that are found stopped too often in a row."""

    def __init__(self) -> None:
        self._looks: Counter[int] = Counter()

    def look(self, pid: int) -> None:
        if state_of(pid) != "T":
            self._looks.pop(pid, None)
            return
        self._looks[pid] += 1
        if self._looks[pid] >= LOOKS:
            _say(f"{title_of(pid)} (pid {pid}) is stopped, and is killed")
            os.kill(pid, signal.SIGKILL)


def state_of(pid: int) -> str | None:
    """The letter that the kernel gives: T is stopped, Z a zombie; None when there is no such
    process, or no such kernel."""
    try:
        # the name before it, in parentheses, may hold anything
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def title_of(pid: int) -> str:
    """What SGLang calls a process of its own; else how it was started."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


_standing_down = threading.Event()


def stand_down() -> None:
    """From now on processes end because they should."""
    _standing_down.set()


def start(end: Callable[[int], object], *, with_parent: bool) -> None:
    """Watch from now on. end: ends this process with a status, 128 + signal or 1.

    with_parent: whether the parent is a process of the server too.
    """
    arguments = (end, os.getppid() if with_parent else None)
    threading.Thread(target=_watch, args=arguments, daemon=True, name="ead-watch").start()


def start_in_engine() -> None:
    """In a process that SGLang has started for its engine, or for HTTP."""
    start(os._exit, with_parent=True)


def ignore_what_is_for_the_main_process() -> None:
    """Ctrl-C reaches every process of the foreground, and systemd's stop every one of a unit; the
    engine is still needed then. It is killed with its parent, however that ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _watch(end: Callable[[int], object], parent: int | None) -> None:
    stopped = StoppedProcesses()
    engine: dict[int, tuple[multiprocessing.process.BaseProcess, str]] = {}
    while not _standing_down.wait(LOOK_SECONDS):
        if parent is not None:
            if os.getppid() != parent:
                end(1)
            stopped.look(parent)
        for child in multiprocessing.active_children():
            pid = child.pid
            if pid is None:
                continue
            stopped.look(pid)
            title = title_of(pid)
            if title.startswith(_ENGINE):
                engine[pid] = child, title
        dead = [(*known, pid) for pid, known in engine.items() if not known[0].is_alive()]
        if dead and not _standing_down.is_set():
            process, title, pid = dead[0]
            code = process.exitcode or 0
            status = 128 - code if code < 0 else 1
            _say(f"{title} (pid {pid}) ended with status {code}, and so does the server")
            end(status)
            return


def _say(line: str) -> None:
    print(f"ead: {line}", file=sys.stderr, flush=True)
