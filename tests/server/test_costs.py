"""What hostile requests cost a server with its usual limits: time of its event loop, and memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from helpers.hostile import Hostile, table
from helpers.reference import TINY_FLAGS
from helpers.waiting import wait_for

from ead_server.launch.process import ServerProcess

LOOP_SECONDS = 1.0  # of processor time of the thread that the event loop runs in
MEMORY_BYTES = 100 << 20  # that do not come back
HOSTILE = list(table())


@pytest.fixture(scope="module")
def patient(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("patient") / "server.log"
    arguments = ["--model-path", str(tiny_model), *TINY_FLAGS]
    with ServerProcess(arguments, log) as process:
        process.wait_until_ready()
        yield process


def loop_seconds(process: psutil.Process) -> float:
    """Processor time of the main thread, in which the event loop runs."""
    (main,) = [thread for thread in process.threads() if thread.id == process.pid]
    return float(main.user_time + main.system_time)


def resident(process: psutil.Process) -> int:
    """Bytes of the server's processes."""
    return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)])


def test_there_are_as_many_as_promised() -> None:
    assert len(HOSTILE) >= 60
    assert len({hostile.name for hostile in HOSTILE}) == len(HOSTILE)


@pytest.fixture(scope="module")
def before(patient: ServerProcess) -> int:
    """Memory once the server has seen a large body: what it loads for its first is its own."""
    texts = {"prompt": ["word " * 2_000] * 200}
    assert httpx.post(patient.url + "/tokenize", json=texts, timeout=60).status_code == 200
    return resident(psutil.Process(patient.process.pid))


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_it_costs_little(patient: ServerProcess, before: int, hostile: Hostile) -> None:
    """Others are answered meanwhile (in a second of the loop's own time, whatever else the machine
    does), the answer is short, and the memory comes back."""
    server = psutil.Process(patient.process.pid)
    body = hostile.body()
    assert len(body) <= 32 << 20, "refused for its size, which is not what is asked here"
    headers = {"content-type": "application/json"}
    headers |= patient.admin_headers if hostile.path.startswith("/v1/annealing") else {}
    method = "PUT" if hostile.path.startswith("/v1/annealing") else "POST"
    spent = loop_seconds(server)
    answer = httpx.request(
        method, patient.url + hostile.path, content=body, headers=headers, timeout=120
    )
    spent = loop_seconds(server) - spent
    del body
    assert answer.status_code in hostile.statuses, answer.text[:300]
    if answer.status_code >= 400:
        assert len(answer.content) < 5_000
    assert spent < LOOP_SECONDS
    wait_for(lambda: resident(server) - before < MEMORY_BYTES, timeout_s=20)


def test_a_probe_is_answered_while_texts_are_tokenised(patient: ServerProcess) -> None:
    """As long as they may be: many texts, each of which fits."""
    body = {"prompt": ["word " * 4000] * 1500}
    done = threading.Event()
    longest = 0.0

    def probe() -> None:
        nonlocal longest
        with httpx.Client() as http:
            while not done.is_set():
                started = time.perf_counter()
                assert http.get(patient.url + "/health/live", timeout=60).status_code == 200
                longest = max(longest, time.perf_counter() - started)

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        answer = httpx.post(patient.url + "/tokenize", json=body, timeout=120)
    finally:
        done.set()
        thread.join()
    assert answer.status_code == 200
    assert longest < 5  # about 0.1 on a quiet machine; on the event loop it would be all the time
