"""A process of the server dies, is stopped, or is told to end: clients hear of it within seconds,
nothing is left running, and with --restart it comes back. All cases: `make soak`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
from helpers.reference import TINY_FLAGS

from benchmarks import dying
from benchmarks.dying import Case, running, tried, wait_for
from ead_server.launch.process import ServerProcess, descendants

KILL, STOP, TERM = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM


@pytest.mark.parametrize(
    "case",
    [
        Case(dying.SCHEDULER, KILL, "streaming"),
        Case(dying.SCHEDULER, STOP, "streaming"),
        Case(dying.DETOKENIZER, KILL, "streaming"),
        Case(dying.DETOKENIZER, STOP, "streaming"),
        Case(dying.MAIN, STOP, "streaming"),
        Case(dying.MAIN, TERM, "paused"),
        Case(dying.MAIN, TERM, "updating"),
        Case(dying.MAIN, TERM, "unread"),
        Case(dying.MAIN, signal.SIGINT, "streaming"),
    ],
    ids=str,
)
def test_clients_hear_within_seconds_and_nothing_is_left(
    case: Case, tiny_model: Path, tmp_path: Path
) -> None:
    with case.server(tiny_model, tmp_path) as server:
        server.wait_until_ready()
        row = tried(case, server, tiny_model)
    assert row.right, row
    if case.number in (KILL, STOP):
        assert row.saw.endswith("Error"), row
        assert row.status in (1, 137, -9), row


def test_one_standstill_and_one_health_check_change_nothing_for_good(
    tiny_model: Path, tmp_path: Path
) -> None:
    """A check of SGLang's that nobody answers while the engine is paused. The server is ready
    again when it goes on, and finishes what it has begun when it is told to end."""
    arguments = ["--model-path", str(tiny_model), *TINY_FLAGS, "--drain-seconds", "60"]
    environ = {"SGLANG_HEALTH_CHECK_TIMEOUT": "1"}
    with (
        ServerProcess(arguments, tmp_path / "server.log", environ=environ) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        server.wait_until_ready()

        def status(path: str) -> int:
            return httpx.get(server.url + path, timeout=30).status_code

        assert dying.ask(server, {"mode": "retract"}, "/pause_generation") == "200"
        assert [status(path) for path in ("/health", "/health/ready", "/ready")] == [503] * 3
        assert httpx.get(f"{server.url}/health/ready").json() == {"status": "paused"}
        assert dying.ask(server, {}, "/continue_generation") == "200"
        assert [status(path) for path in ("/health/ready", "/ready")] == [200] * 2

        began = threading.Event()
        call = pool.submit(dying.read_stream, server, began)
        assert began.wait(60)
        server.process.send_signal(TERM)
        assert call.result(timeout=60) == "whole"
        assert server.process.wait(timeout=60) == 0


def test_a_second_ctrl_c_ends_at_once(tiny_model: Path, tmp_path: Path) -> None:
    """To the whole group, as a terminal sends it: the engine goes on working after the first."""
    arguments = ["--model-path", str(tiny_model), *TINY_FLAGS, "--drain-seconds", "600"]
    with (
        ServerProcess(arguments, tmp_path / "server.log") as server,
        ThreadPoolExecutor(2) as pool,
    ):
        server.wait_until_ready()
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert dying.ask(server, {"mode": "retract"}, "/pause_generation") == "200"
        began = threading.Event()
        call = pool.submit(dying.read_stream, server, began)
        assert not began.wait(0.5)  # it waits for the engine to go on
        os.killpg(server.process.pid, signal.SIGINT)
        ready = f"{server.url}/health/ready"
        wait_for(lambda: "shutting down" in httpx.get(ready, timeout=30).text)
        assert dying.ask(server) == "503"
        assert dying.ask(server, {}, "/continue_generation") == "200"
        assert began.wait(60)
        os.killpg(server.process.pid, signal.SIGINT)
        assert call.result(timeout=60).endswith("Error")
        assert server.process.wait(timeout=30) == 130
        wait_for(lambda: running(family) == [], 10)


# --- --restart, on commands that need no model --------------------------------------------------


@contextmanager
def kept_alive(tmp_path: Path, code: str, pause_s: float = 0.05) -> Iterator[subprocess.Popen[str]]:
    """A process that keeps `python -c code` alive; each run leaves a line in `runs`."""
    process = subprocess.Popen(keeper(tmp_path, code, pause_s), stderr=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            left = descendants(process.pid)
            for pid in (process.pid, *left):
                with suppress(ProcessLookupError):
                    os.kill(pid, KILL)


def keeper(tmp_path: Path, code: str, pause_s: float = 0.05) -> tuple[str, ...]:
    told = f"open({str(tmp_path / 'runs')!r}, 'a').write(f'{{os.getpid()}}\\n')"
    before, _, after = code.rpartition("; ")
    command = f"import os, signal, time; {before or 'pass'}; {told}; {after}"
    keep = f"keep_alive([sys.executable, '-c', {command!r}], pause_s={pause_s})"
    text = f"import sys; from ead_server.launch.process import keep_alive; sys.exit({keep})"
    return sys.executable, "-c", text


def runs(tmp_path: Path) -> list[int]:
    file = tmp_path / "runs"
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_told_to_end_between_two_runs_it_begins_no_other(tmp_path: Path) -> None:
    with kept_alive(tmp_path, "os._exit(1)", pause_s=600) as keeper:
        assert keeper.stderr is not None
        assert "starting it again" in keeper.stderr.readline()
        keeper.send_signal(TERM)
        assert keeper.wait(timeout=60) == 0
    assert len(runs(tmp_path)) == 1


def test_three_short_runs_end_with_what_ended_the_last(tmp_path: Path) -> None:
    with kept_alive(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)") as keeper:
        assert keeper.wait(timeout=60) == 128 + KILL
    assert len(runs(tmp_path)) == 3


def test_a_server_that_is_stopped_is_replaced(tmp_path: Path) -> None:
    with kept_alive(tmp_path, "time.sleep(600)") as keeper:
        wait_for(lambda: len(runs(tmp_path)) == 1)
        os.kill(runs(tmp_path)[0], STOP)
        wait_for(lambda: len(runs(tmp_path)) == 2)
        keeper.send_signal(TERM)
        assert keeper.wait(timeout=60) == 0


def test_a_server_with_restart_is_stopped_with_all_it_started(tmp_path: Path) -> None:
    """It is deaf to SIGTERM, and in a session of its own."""
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    with ServerProcess([], tmp_path / "log", command=keeper(tmp_path, deaf)) as process:
        wait_for(lambda: len(runs(tmp_path)) == 1)
        server = psutil.Process(runs(tmp_path)[0])
        process.stop(timeout_s=0.5)
        try:
            wait_for(lambda: running([server]) == [], 10)
        finally:
            with suppress(psutil.NoSuchProcess):
                server.kill()
