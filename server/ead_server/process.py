"""A server in a child process, for programs that need one of their own: the demo and the tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import httpx

HOST = "127.0.0.1"


class ServerFailed(RuntimeError):
    """The server could not start, ended, or did not become ready in time; the message says why."""


class ServerProcess:
    """`ead serve` (or another command) on loopback, started now and stopped on exit.

    port: 0 for any free one. command: without host and port. log: file that takes the server's
    output. Everything that the server starts is in its own process group, and is stopped with it.
    Raises ServerFailed when the port is taken.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        port: int = 0,
        command: Sequence[str] = (sys.executable, "-m", "ead_server.cli", "serve"),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        # held until stop(): a server listens only after its model is loaded, and by then another
        # program could have been given the port
        self._held = hold_port(HOST, port)
        self.port: int = self._held.getsockname()[1]
        self.url = f"http://{HOST}:{self.port}"
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *arguments, "--host", HOST, "--port", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environ or {})},
                start_new_session=True,
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
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            progress(self.log_end(1).strip())
            time.sleep(0.2)
        self.stop()
        raise ServerFailed(f"not ready after {timeout_s:.0f} s\n{self.log_end()}")

    def stop(self, timeout_s: float = 20.0) -> None:
        """Ask the server to end, then end whatever is left of its process group."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._held.close()

    def log_end(self, lines: int = 30) -> str:
        """The last lines of the server's output."""
        text = self.log.read_bytes()[-20_000:].decode(errors="replace")
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def hold_port(host: str, port: int = 0) -> socket.socket:
    """A socket that keeps a TCP port (0: any free one) for a server that will listen on it.

    Bound and never listening: Linux hands the port to nobody who asks for any port, while a server
    that asks for this one with SO_REUSEADDR, as uvicorn does, gets it. Raises ServerFailed when it
    is taken or the host is not this machine's.
    """
    with contextlib.ExitStack() as on_error:
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            held = on_error.enter_context(socket.socket(family, socket.SOCK_STREAM))
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(address)
        except OSError as error:
            raise ServerFailed(f"cannot listen on {host}:{port}: {error.strerror}") from error
        on_error.pop_all()
    return held
