"""Who is kept waiting, and by what: large answers, engines that hang, readers that do not read."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil
import pytest
from fastapi import FastAPI
from helpers.guarded import KEY, begins
from helpers.reference import TINY_FLAGS, Reference
from helpers.rollout_calls import LONG, answer_of, request_text, wait_until_idle
from helpers.serving import FAST, check_against_reference
from helpers.waiting import wait_for

from ead_client import Client, EadError
from ead_server import media_types
from ead_server.edge import health
from ead_server.launch.process import ServerProcess
from ead_server.rollouts import packing, routes
from ead_server.rollouts.job import Group, Job
from ead_server.rollouts.kept_jobs import KeptJobs
from ead_server.rollouts.request import Prompt

# --- the event loop ------------------------------------------------------------------------------


def finished_job() -> Job:
    """Groups that were generated already, large enough to be written in a thread."""
    group = Group(0, Prompt(text="x"), 1, {})
    group.answers = [answer_of([7] * 10_000, 0.5)]

    class Done(Group):
        async def run(self, engine: Any) -> Group:
            return group

    job = Job([Done(0, group.prompt, 1, {})], None, "m")  # type: ignore[arg-type]
    job.groups = [group]
    return job


@pytest.mark.parametrize(
    ("work", "accept"),
    [
        ((routes, "parse"), media_types.JSON),
        ((packing, "json_answer"), media_types.JSON),
        ((packing, "binary_answer"), media_types.SAFETENSORS),
        ((packing, "json_line"), media_types.NDJSON),
        ((packing, "frame"), media_types.FRAMES),
    ],
    ids=["reading", "json", "safetensors", "ndjson", "safetensors-seq"],
)
def test_others_are_answered_while_a_large_call_is_read_or_written(
    work: tuple[Any, str], accept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work is held until /health/live has answered; on the event loop, it never would."""
    at_work, others_were_answered = threading.Event(), threading.Event()
    module, name = work
    original: Callable[..., Any] = getattr(module, name)

    def held(*arguments: Any) -> Any:
        at_work.set()
        assert others_were_answered.wait(10)
        return original(*arguments)

    monkeypatch.setattr(module, name, held)
    monkeypatch.setattr(routes, "_kept", KeptJobs())
    app = FastAPI()
    app.include_router(routes.router)
    app.include_router(health.router)
    app.is_single_tokenizer_mode = True  # type: ignore[attr-defined]
    body = orjson.dumps({"prompts": [[7] * 200_000]})

    async def both() -> httpx.Response:
        routes._kept.keep("k", body, finished_job())
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            headers = {"idempotency-key": "k", "accept": accept}
            call = asyncio.create_task(
                http.post("/v1/rollouts", content=body, headers=headers, timeout=60)
            )
            assert await asyncio.to_thread(at_work.wait, 10)
            assert (await http.get("/health/live")).status_code == 200
            assert not call.done()
            others_were_answered.set()
            return await call

    answer = asyncio.run(both())
    assert answer.status_code == 200
    assert len(answer.content) > 10_000


# --- an engine that hangs, and one that is gone ------------------------------------------------


def scheduler_of(server: ServerProcess) -> psutil.Process:
    family = psutil.Process(server.process.pid).children(recursive=True)
    (scheduler,) = (p for p in family if "scheduler" in "".join(p.cmdline()))
    return scheduler


def ready(server: ServerProcess) -> tuple[int, str]:
    answer = httpx.get(f"{server.url}/health/ready", timeout=5)
    return answer.status_code, answer.json()["status"]


def running(family: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended."""
    return [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_health_tells_an_engine_that_hangs_from_one_that_works_and_one_that_is_gone(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The scheduler is stopped, goes on, and is killed; nothing is asked to generate for health."""
    arguments = ["--model-path", str(tiny_model), *TINY_FLAGS]
    environ = {"SGLANG_HEALTH_CHECK_TIMEOUT": "2"}
    with (
        ServerProcess(arguments, tmp_path / "server.log", environ=environ) as server,
        Client(server.url, retries=0, timeout=120) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        server.wait_until_ready()
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert ready(server) == (200, "ready")
        scheduler = scheduler_of(server)
        scheduler.suspend()
        try:
            assert ready(server) == (200, "ready")  # nobody waits
            call = pool.submit(client.complete, "x", max_tokens=3)
            wait_for(lambda: ready(server)[0] == 503)
            assert "answered nothing for" in ready(server)[1]
            assert httpx.get(f"{server.url}/health/live", timeout=5).status_code == 200
        finally:
            scheduler.resume()
        assert call.result(timeout=60).choices
        assert ready(server) == (200, "ready")

        call = pool.submit(client.rollouts, ["x"], **LONG)
        scheduler.kill()
        assert isinstance(call.exception(timeout=60), EadError)
        assert server.process.wait(timeout=60) != 0
        with pytest.raises(httpx.ConnectError):
            ready(server)
        assert running(family) == []


def test_at_the_end_answers_are_finished_and_no_process_is_left(
    tiny_model: Path, tmp_path: Path
) -> None:
    """SIGTERM while answers are generated that can be finished in time."""
    arguments = ["--model-path", str(tiny_model), *TINY_FLAGS, "--drain-seconds", "60"]
    with (
        ServerProcess(arguments, tmp_path / "server.log") as server,
        Client(server.url, retries=0, timeout=120) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        server.wait_until_ready()
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert len(family) >= 2
        params = {"max_new_tokens": 400, "ignore_eos": True}
        calls = [pool.submit(client.rollouts, ["x"], n=2, **params) for _ in range(4)]
        wait_for(lambda: begins(client))
        server.process.send_signal(signal.SIGTERM)
        for call in calls:
            for answer in call.result(timeout=60).groups[0].answers:
                assert answer.finish_reason == "length"
                assert answer.rollout is not None
                assert len(answer.rollout) == 400
        assert server.process.wait(timeout=60) == 0
        assert running(family) == []


@pytest.fixture(params=["1", "2"], ids=["one-worker", "two-workers"])
def starting(
    tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[ServerProcess]:
    """A server with an API key that listens, and that SGLang warms up now."""
    arguments = ["--model-path", str(tiny_model), *TINY_FLAGS, "--drain-seconds", "5"]
    arguments += ["--tokenizer-worker-num", request.param]
    log = tmp_path / "server.log"
    with ServerProcess(arguments, log, environ={"EAD_API_KEY": KEY}) as server:
        wait_for(lambda: listens(server), 240)
        yield server


def listens(server: ServerProcess) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", server.port)) == 0


def test_told_to_end_while_it_warms_up_it_keeps_what_it_has_begun(starting: ServerProcess) -> None:
    """A client that does not wait for readiness. SGLang kills a worker whose warm-up fails, and so
    the warm-up, which is a request like any other, must not be refused as new work is."""
    with (
        Client(starting.url, api_key=KEY, retries=0, timeout=120) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        call = pool.submit(client.rollouts, ["x"], n=48, max_new_tokens=900, ignore_eos=True)
        wait_for(lambda: begins(client))
        assert httpx.get(f"{starting.url}/v1/models", timeout=30).status_code == 401
        starting.process.send_signal(signal.SIGTERM)
        reasons = {a.finish_reason for a in call.result(timeout=60).groups[0].answers}
        assert reasons <= {"abort", "length"}
        assert "abort" in reasons
        assert starting.process.wait(timeout=60) == 0


def test_told_to_end_before_it_was_asked_anything_it_does_not_wait_for_its_warm_up(
    starting: ServerProcess,
) -> None:
    """SGLang's would ask a server that listens no more, for two minutes or for twelve."""
    family = psutil.Process(starting.process.pid).children(recursive=True)
    starting.process.send_signal(signal.SIGTERM)
    assert starting.process.wait(timeout=60) == 0
    assert running(family) == []


def test_told_to_end_while_it_loads_its_model_it_leaves_no_process(
    tiny_model: Path, tmp_path: Path
) -> None:
    arguments = ["--model-path", str(tiny_model), *TINY_FLAGS]
    with ServerProcess(arguments, tmp_path / "server.log") as server:
        process = psutil.Process(server.process.pid)
        wait_for(lambda: len(process.children(recursive=True)) >= 2)
        family = process.children(recursive=True)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0
        assert running(family) == []


# --- clients that do not read, or do not send --------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/rollouts", "/generate"])
def test_readers_that_never_read_and_senders_that_never_end_keep_nobody_waiting(
    server: ServerProcess, client: Client, reference: Reference, path: str
) -> None:
    """Twenty of each stay connected, with answers that are larger than what a socket holds."""
    params: dict[str, Any] = {"max_new_tokens": 500, "ignore_eos": True, "annealing": FAST}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {
            "model": "m",
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": 500,
            "ignore_eos": True,
            "annealing": FAST,
            "stream": True,
        },
        "/v1/rollouts": {
            "prompts": ["x"] * 2,
            "annealing": FAST,
            "sampling_params": {"max_new_tokens": 500, "ignore_eos": True},
        },
        "/generate": {"text": "x", "sampling_params": params, "stream": True},
    }
    text = request_text(client, path, bodies[path])
    connections = []
    try:
        for index in range(40):
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(text if index % 2 else text[:-10])
            connections.append(connection)
        answer = client.rollouts(["def "], n=2, annealing=FAST, max_new_tokens=10, ignore_eos=True)
        for choice in answer.groups[0].answers:
            assert choice.rollout is not None
            check_against_reference(choice.rollout, reference)
    finally:
        for connection in connections:
            connection.close()
    wait_until_idle(client)
