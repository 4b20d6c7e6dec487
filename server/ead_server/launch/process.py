"""A server in a child process, for programs that need one of their own: the demo and the tests."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

from ead_server.errors import ServerFailed
from ead_server.lifecycle.watch import LOOK_SECONDS, StoppedProcesses
from ead_server.settings import read_key

HOST = "127.0.0.1"
_IN_A_HURRY_S = 5.0  # for a server to end by itself that nobody needs any more
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ServerProcess:
    """`ead serve` (or another command) on loopback, started now and stopped on exit.

    It has an admin key of its own, `admin_api_key`, and asks for the `api_key` that its arguments
    or the environment name (None: for none). It is told to end when the thread that made it is
    gone, however that ended (Linux).

    port: 0 for any free one. command: without host and port. log: file that the server's output is
    added to. Everything that the server starts is in its own process group, and is stopped with it.
    Raises ServerFailed when the port is taken.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        port: int = 0,
        command: Sequence[str] = (sys.executable, "-m", "ead_cli.main", "serve"),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        # held until stop(): a server listens only after its model is loaded, and by then another
        # program could have been given the port
        self._held = hold_port(HOST, port)
        self.port: int = self._held.getsockname()[1]
        self.url = f"http://{HOST}:{self.port}"
        self.log = log
        self.admin_api_key = secrets.token_urlsafe(32)
        environ = {
            **os.environ,
            "EAD_ADMIN_API_KEY": self.admin_api_key,
            **(environ or {}),
        }
        self.api_key = _api_key([*command, *arguments], environ)
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, *arguments, "--host", HOST, "--port", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def wait_until_ready(
        self, timeout_s: float = 300.0, progress: Callable[[str], None] = lambda line: None
    ) -> None:
        """Return once the server answers requests. Raises ServerFailed.

        progress: called about five times a second with the newest line of the log.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerFailed(f"exit status {self.process.returncode}\n{self.log_end()}")
            try:
                # 503 until SGLang's own warm-up request has been answered
                if httpx.get(f"{self.url}/health", timeout=5, trust_env=False).is_success:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            progress(self.log_end(1).strip())
            time.sleep(0.2)
        self.stop()
        raise ServerFailed(f"not ready after {timeout_s:.0f} s\n{self.log_end()}")

    def stop(self, timeout_s: float = 60.0) -> None:
        """Ask the server to end, then end whatever is left of what it started.

        timeout_s: more than the --drain-seconds of a server that may be at work.
        """
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
        if self.process.poll() is None:
            family = descendants(self.process.pid)  # with --restart, in a session of their own
            self.process.kill()
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._held.close()

    @property
    def admin_headers(self) -> dict[str, str]:
        """For calls that change the server."""
        return {"authorization": f"Bearer {self.admin_api_key}"}

    def log_end(self, lines: int = 30) -> str:
        """The last lines of the server's output."""
        text = self.log.read_bytes()[self._log_start :][-20_000:].decode(errors="replace")
        return "\n".join([line for line in text.split("\n") if line.strip()][-lines:])

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # after an error, or Ctrl-C, nobody waits for the answers that the server would finish
        self.stop() if kind is None else self.stop(_IN_A_HURRY_S)


def flags_beside_a_trainer(*, on_cpu: bool) -> list[str]:
    """SGLang's, for a server that shares its device with what trains its model."""
    if on_cpu:  # a trainer's steps are smaller than bfloat16 resolves
        return ["--dtype", "float32"]
    # Attention on a GPU takes 16 bits, and of a float32 model SGLang would make float16. By itself
    # it takes nearly all memory; a trainer needs 16 bytes per weight, and room for activations.
    return ["--dtype", "bfloat16", "--mem-fraction-static", "0.4"]


def _api_key(arguments: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """The key that such a server asks of its callers."""
    key, file = environ.get("EAD_API_KEY"), environ.get("EAD_API_KEY_FILE")
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        if flag == "--api-key":
            key = value if equals else following
        elif flag == "--api-key-file":
            file = value if equals else following
    with contextlib.suppress(OSError, UnicodeDecodeError):  # the server says so
        return read_key(key, file)
    return None


def keep_alive(command: Sequence[str], *, pause_s: float = 1.0) -> int:
    """Run `command`, and run it again whenever it dies; the exit status of its last run, as a shell
    would give it: 128 + the signal that ended it.

    It ends for good with status 0 or 2, when it fails within a minute of starting for the third
    time in a row, and when this process is told to end, which is passed on. Status 1 counts as
    dying, and so does being stopped (SIGSTOP) for seconds. The pause before the next run doubles
    while runs are short, up to a minute.
    """
    told: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: object) -> None:
        told.append(number)
        if child is not None:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    short_runs = 0
    while True:
        started = time.monotonic()
        child = subprocess.Popen(command, start_new_session=True, preexec_fn=_end_with_parent)
        if told:  # while it was made
            child.send_signal(told[-1])
        status = _end_of(child)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # what a killed server left behind
        short_runs = short_runs + 1 if time.monotonic() - started < 60 else 0
        if told and -status in told:  # it had not begun yet
            return 0
        if told or status in (0, 2) or short_runs >= 3:
            return status if status >= 0 else 128 - status
        pause = min(pause_s * 2**short_runs, 60.0)
        print(
            f"ead: the server ended with status {status}; starting it again in {pause:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        until = time.monotonic() + pause
        while time.monotonic() < until:
            if told:
                return 0
            time.sleep(0.1)


def _end_of(child: subprocess.Popen[bytes]) -> int:
    """Its status, once it has ended; one that is stopped is killed."""
    stopped = StoppedProcesses()
    while True:
        try:
            return child.wait(LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            stopped.look(child.pid)


def descendants(pid: int) -> list[int]:
    """The processes that this one has started, that these have started, and so on (Linux)."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, ())
    return found[1:]


def _end_with_parent() -> None:
    """Between fork and exec: SIGTERM when the parent is gone, even by SIGKILL."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port_after(host: str, port: int) -> int | None:
    """The next port that nothing listens on, where there is one among the next hundred."""
    for free in range(port + 1, min(port + 101, 65536)):
        family, *_, address = socket.getaddrinfo(host, free, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as tried, contextlib.suppress(OSError):
            tried.bind(address)
            return free
    return None


def hold_port(host: str, port: int = 0) -> socket.socket:
    """A socket that keeps a TCP port (0: any free one) for a server that will listen on it.

    Bound and never listening: Linux hands the port to nobody who asks for any port, while a server
    that asks for this one with SO_REUSEADDR, as uvicorn does, gets it. Raises ServerFailed when it
    is taken or the host is not this machine's.
    """
    if not 0 <= port <= 65535:  # getaddrinfo would take the rest of a division
        raise ServerFailed(f"--port: must be an integer from 0 to 65535, got {port}")
    with contextlib.ExitStack() as on_error:
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            held = on_error.enter_context(socket.socket(family, socket.SOCK_STREAM))
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(address)
        except OSError as error:
            reason = f"cannot listen on {host}:{port}: {error.strerror}"
            if error.errno == errno.EADDRINUSE and (free := _free_port_after(host, port)):
                reason += f"; --port {free} is free"
            raise ServerFailed(reason) from error
        on_error.pop_all()
    return held
