"""One process of a server is killed, stopped or told to end: what its clients see, what is left.

A case is a process, a signal and a state of the server; each has a fresh server on a tiny model.
Used by benchmarks/soak.py for all of them, and by tests/server/test_dying.py for a few.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from ead_server.launch.process import ServerProcess

LIMIT_SECONDS = 10.0  # for clients to hear of it, and for every process to be gone
FLAGS = (
    *("--dtype", "float32", "--attention-backend", "torch_native"),
    *("--max-total-tokens", "65536"),  # memory of the cache that is soon in use
)
LONG = {"model": "m", "prompt": "x", "max_tokens": 3900, "ignore_eos": True, "stream": True}
# flags with which a server has a process
MAIN, SCHEDULER, DETOKENIZER = "main", "scheduler", "detokenizer"
WORKER, CONTROLLER = "tokenizer_worker", "data_parallel_controller"
KEEPER, KEPT = "keeper", "kept"  # what --restart is, and the main process that it starts again
PROCESSES: dict[str, tuple[str, ...]] = {
    MAIN: (),
    SCHEDULER: (),
    DETOKENIZER: (),
    WORKER: ("--tokenizer-worker-num", "2"),
    CONTROLLER: ("--dp-size", "2"),
    KEEPER: ("--restart",),
    KEPT: ("--restart",),
}
REPLACED = (WORKER, KEPT)
TO_END = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Case:
    """number: the signal that one `process` gets, in one of STATES."""

    process: str
    number: signal.Signals
    state: str

    def __str__(self) -> str:
        return f"{self.number.name} to {self.process}, {self.state}"

    @property
    def possible(self) -> bool:
        """Some have no updates over HTTP, or by broadcast; who drains was told to end already. No
        client depends on a keeper that is stopped."""
        without = {
            WORKER: ("updating", "joining"),
            CONTROLLER: ("joining",),
            KEPT: ("draining",),
            KEEPER: ("draining",),  # without it the server finishes and ends, as it was told to
        }
        if self.number in TO_END:
            return self.process in (MAIN, KEEPER) and self.state != "draining"
        if self.process == KEEPER and self.number == signal.SIGSTOP:
            return False
        return self.state not in ("unread", *without.get(self.process, ()))

    def server(self, model: Path, folder: Path) -> ServerProcess:
        """Starts one to try this case on; weights may come from `folder`."""
        drain = 60 if self.state == "draining" else 1
        arguments = ["--model-path", str(model), *FLAGS, "--drain-seconds", str(drain)]
        arguments += ["--chunked-prefill-size", "64", "--weights-root", str(folder)]
        name = str(self).replace(" ", "-").replace(",", "")
        arguments += PROCESSES[self.process]
        # on a CPU, SGLang wants to be told where its data-parallel schedulers run
        environ = {"SGLANG_CPU_OMP_THREADS_BIND": "0|0"} if self.process == CONTROLLER else {}
        return ServerProcess(arguments, folder / f"{name}.log", environ=environ)


@dataclass(frozen=True)
class Row:
    """What came of a case. seconds: from the signal until the client had heard of it and, unless a
    process was replaced, no process was left. status: of the main process; None: it runs on."""

    case: Case
    saw: str
    seconds: float
    left: tuple[str, ...]
    status: int | None

    @property
    def right(self) -> bool:
        """In time, nothing left, and with the status that a shell would give. One that was told to
        end before a worker died ends as it was told."""
        ends = self.case.number in TO_END or (
            self.case.process == WORKER and self.case.state == "draining"
        )
        return self.seconds <= LIMIT_SECONDS and not self.left and (self.status == 0) == ends


def tried(case: Case, server: ServerProcess, model: Path) -> Row:
    """The case on its server, which is ready, and has ended afterwards."""
    with ThreadPoolExecutor(4) as pool, contextlib.ExitStack() as at_the_end:
        at_the_end.callback(server.stop, 0.0)  # before the pool waits for its threads
        call = at_the_end.enter_context(STATES[case.state](server, pool, model))
        family = _family(server)
        target = _target(case.process, family, server.port)
        if case.process == KEPT:
            family = [target, *target.children(recursive=True)]
        moment = time.monotonic()
        target.send_signal(case.number)
        if call is None:
            call = pool.submit(ask, server)
        try:
            saw = call.result(timeout=3 * LIMIT_SECONDS)
        except TimeoutError:
            saw = "nothing"
        heard = time.monotonic() - moment
        replaced = case.process in REPLACED and case.state != "draining"
        if case.process == WORKER and replaced:
            family = [target]
        while running(family) and time.monotonic() < moment + 3 * LIMIT_SECONDS:
            server.process.poll()
            time.sleep(0.1)
        gone = time.monotonic() - moment
        left = tuple(" ".join(p.cmdline())[:60] or "?" for p in running(family))
        if replaced:
            if case.state == "paused":  # the engine stands still, whoever answers for it
                wait_for(lambda: ask(server, {}, "/continue_generation") == "200", 120)
            wait_for(lambda: ask(server) == "200", 120)  # by another, or by its successor
            status = server.process.poll()
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(5)
            status = server.process.returncode
        return Row(case, saw, max(heard, gone), left, status)


def _family(server: ServerProcess) -> list[psutil.Process]:
    """All processes of a server; the first is the one that its starter knows."""
    first = psutil.Process(server.process.pid)
    return [first, *first.children(recursive=True)]


def _target(name: str, family: list[psutil.Process], port: int) -> psutil.Process:
    if name in (MAIN, KEEPER):
        return family[0]
    if name == KEPT:
        return family[1]
    found = [p for p in family[1:] if f"sglang::{name}" in " ".join(p.cmdline())]
    if name != WORKER:
        return found[0]
    # the one that has a client, if any has
    return next((p for p in found if _has_client(p, port)), found[0])


def _has_client(process: psutil.Process, port: int) -> bool:
    connections = process.net_connections("tcp")
    return any(c.laddr.port == port and c.status == "ESTABLISHED" for c in connections)


def running(family: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended."""
    found = []
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)


def generates(server: ServerProcess) -> bool:
    """Whether it has answers to generate, or to begin with."""
    answer = httpx.get(f"{server.url}/v1/loads", headers=server.admin_headers, timeout=60)
    loads = answer.json()["loads"]
    return any(one["num_running_reqs"] + one["num_waiting_reqs"] for one in loads)


# --- what a client does ------------------------------------------------------------------------


def ask(server: ServerProcess, body: dict[str, Any] | None = None, path: str = "") -> str:
    """One request: its status, or the name of what went wrong."""
    body = body or {"model": "m", "prompt": "x", "max_tokens": 2}
    try:
        answer = httpx.post(
            server.url + (path or "/v1/completions"),
            json=body,
            headers=server.admin_headers,
            timeout=3 * LIMIT_SECONDS,
        )
    except httpx.HTTPError as error:
        return type(error).__name__
    return str(answer.status_code)


def read_stream(server: ServerProcess, began: threading.Event) -> str:
    """A long answer, token by token: how it ended."""
    reason = "no end"
    try:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as answer:
            for line in answer.iter_lines():
                began.set()
                if line == "data: [DONE]":
                    return reason
                if '"finish_reason":"' in line.replace(" ", ""):
                    reason = "abort" if "abort" in line else "whole"
    except httpx.HTTPError as error:
        return type(error).__name__
    return reason


def trickle(server: ServerProcess, body: bytes, began: threading.Event) -> str:
    """Weights of which the second half takes for ever."""

    def parts() -> Iterator[bytes]:
        yield body[: len(body) // 2]
        began.set()
        for byte in body[len(body) // 2 :]:
            yield bytes([byte])
            time.sleep(0.1)

    try:
        answer = httpx.post(
            f"{server.url}/v1/weights/tensors",
            params={"version": "next"},
            content=parts(),
            headers=server.admin_headers,
            timeout=60,
        )
    except httpx.HTTPError as error:
        return type(error).__name__
    return str(answer.status_code)


# --- states: each brings a server into one, with a client that waits ------------------------------

Call = Future[str] | None
State = Callable[[ServerProcess, ThreadPoolExecutor, Path], contextlib.AbstractContextManager[Call]]


@contextlib.contextmanager
def idle(server: ServerProcess, pool: ThreadPoolExecutor, model: Path) -> Iterator[Call]:
    yield None


@contextlib.contextmanager
def streaming(server: ServerProcess, pool: ThreadPoolExecutor, model: Path) -> Iterator[Call]:
    began = threading.Event()
    call = pool.submit(read_stream, server, began)
    assert began.wait(60)
    yield call


@contextlib.contextmanager
def prefill(server: ServerProcess, pool: ThreadPoolExecutor, model: Path) -> Iterator[Call]:
    body = {"model": "m", "prompt": [[7] * 3900] * 64, "max_tokens": 1}
    call = pool.submit(ask, server, body)
    wait_for(lambda: generates(server))
    yield call


@contextlib.contextmanager
def updating(server: ServerProcess, pool: ThreadPoolExecutor, model: Path) -> Iterator[Call]:
    """A version comes slowly."""
    began = threading.Event()
    data = (model / "model.safetensors").read_bytes()
    call = pool.submit(trickle, server, struct.pack("<Q", len(data)) + data, began)
    assert began.wait(60)
    yield call


@contextlib.contextmanager
def joining(server: ServerProcess, pool: ThreadPoolExecutor, model: Path) -> Iterator[Call]:
    """The engine waits for a trainer that never says anything."""
    manifest = httpx.get(f"{server.url}/v1/weights/manifest", timeout=60).json()
    bucket = [{key: one[key] for key in ("name", "dtype", "shape")} for one in manifest]
    with socket.create_server(("127.0.0.1", 0)) as trainer:
        group = {
            "name": "g",
            "master_address": "127.0.0.1",
            "master_port": trainer.getsockname()[1],
            "backend": "gloo",
        }
        body = {"version": "next", "group": group, "buckets": [bucket]}
        call = pool.submit(ask, server, body, "/v1/weights/distributed")
        trainer.settimeout(60)
        held = [trainer.accept() for _ in range(2)]  # the server's look, and the engine
        yield call
        for connection, _ in held:
            connection.close()


@contextlib.contextmanager
def paused(server: ServerProcess, pool: ThreadPoolExecutor, model: Path) -> Iterator[Call]:
    """Somebody waits for it to go on."""
    assert ask(server, {"mode": "retract"}, "/pause_generation") == "200"
    call = pool.submit(ask, server)
    time.sleep(0.5)
    yield call


@contextlib.contextmanager
def draining(server: ServerProcess, pool: ThreadPoolExecutor, model: Path) -> Iterator[Call]:
    with streaming(server, pool, model) as call:
        server.process.send_signal(signal.SIGTERM)
        ready = f"{server.url}/health/ready"
        wait_for(lambda: "shutting down" in httpx.get(ready, timeout=30).text)
        yield call


@contextlib.contextmanager
def unread(server: ServerProcess, pool: ThreadPoolExecutor, model: Path) -> Iterator[Call]:
    """A long answer is ready for a client that never reads it."""
    body = b'{"text": ["x", "x", "x", "x"], "stream": true, "sampling_params": '
    body += b'{"max_new_tokens": 500, "ignore_eos": true}}'
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        head = b"POST /generate HTTP/1.1\r\nhost: 127.0.0.1:%d\r\n" % server.port
        head += b"content-type: application/json\r\n"
        client.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: generates(server))
        wait_for(lambda: not generates(server))
        yield pool.submit(lambda: "reads nothing")


STATES: dict[str, State] = {
    state.__name__: state
    for state in (idle, prefill, streaming, updating, joining, paused, draining, unread)
}
