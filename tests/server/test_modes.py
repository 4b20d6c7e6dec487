"""One more server, started so that everything moves: two tokenizer workers, chunked and mixed
prefill, incremental streams, and memory for a few requests only, so that SGLang takes it away from
running ones again and again (retraction). Schedules must not notice. The last test ends the
server."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from helpers.guarded import answers_ready, begins
from helpers.kinds_served import WITH_STATE, check_all_kinds
from helpers.reference import TINY_FLAGS, Reference
from helpers.serving import FAST, check_against_reference, expected_temperatures
from helpers.waiting import wait_for

from ead_client import Client, EadError, RequestRefused, Rollout, Rollouts
from ead_server.launch.process import ServerProcess

FLAGS = (
    *TINY_FLAGS,
    *("--tokenizer-worker-num", "2"),
    *("--chunked-prefill-size", "64", "--enable-mixed-chunk"),
    "--incremental-streaming-output",
    *("--max-total-tokens", "512", "--max-running-requests", "32"),
    *("--restart", "--drain-seconds", "6"),
)
# a scheduler that reserves memory for 8 more tokens of each request, and so lets in too many
ENVIRON = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8"}


@pytest.fixture(scope="module")
def restless(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("restless") / "server.log"
    arguments = ["--model-path", str(tiny_model), *FLAGS]
    with ServerProcess(arguments, log, environ=ENVIRON) as process:
        process.wait_until_ready()
        yield process


def test_schedules_survive_retraction_chunks_and_several_workers(
    restless: ServerProcess, reference: Reference
) -> None:
    info = httpx.get(f"{restless.url}/server_info", timeout=30).json()
    assert info["enable_mixed_chunk"] is True  # and not switched off for want of something
    assert info["chunked_prefill_size"] == 64
    # falling at every token, so that each shows its t
    slow = {**FAST, "decay": 90.0}
    schedules = [slow, {"preset": "paper", "step": 10}, {**slow, "position_offset": 9}]

    def one(index: int) -> Rollout:
        with Client(restless.url, timeout=240) as client:  # a connection of its own
            answer = client.complete(
                "def schedule(positions, parameters): " * (1 + 5 * (index % 6)),
                annealing=schedules[index % 3],
                max_tokens=40 + index,
                ignore_eos=True,
            )
        assert answer.choices[0].rollout is not None
        return answer.choices[0].rollout

    def all_at_once() -> None:
        with ThreadPoolExecutor(18) as pool:
            rollouts = list(pool.map(one, range(18)))
        for index, rollout in enumerate(rollouts):
            want = expected_temperatures(schedules[index % 3], 40 + index)
            assert len(rollout) == len(want)
            assert np.abs(rollout.temperatures - want).max() < 1e-6
            check_against_reference(rollout, reference)

    until_retracted(restless, all_at_once, times=4)


def test_clocks_and_thresholds_survive_retraction_too(
    restless: ServerProcess, reference: Reference
) -> None:
    """Kinds with state are prefilled again from what the host last saw of it. There are no others
    here, so that whatever is retracted has some."""
    until_retracted(restless, lambda: check_all_kinds(restless, reference, 26, WITH_STATE), times=4)


def until_retracted(server: ServerProcess, work: Callable[[], None], times: int) -> None:
    """Do the work again until requests were retracted in it so often: how many SGLang lets in is a
    matter of timing, and it learns from retractions."""
    before = retractions(server)
    for _ in range(10):
        work()
        if retractions(server) >= before + times:
            return
    pytest.fail("the work was done, without retractions: this has shown less than it says")


def retractions(server: ServerProcess) -> int:
    """How often the server has taken their memory from running requests because it was used up."""
    log = server.log.read_text(errors="replace")
    found = re.findall(r"KV cache pool is full. Retract requests. #retracted_reqs: (\d+)", log)
    return sum(map(int, found))


def test_incremental_streams_carry_every_token_once(
    restless: ServerProcess, reference: Reference
) -> None:
    with Client(restless.url, timeout=120) as client:
        messages = [{"role": "user", "content": "hello"}]
        chunks = list(
            client.stream_chat(messages, annealing=FAST, max_tokens=30, ignore_eos=True, n=2)
        )
    for index in range(2):
        choices = [c for chunk in chunks for c in chunk.choices if c.index == index]
        parts = [choice.rollout for choice in choices if choice.rollout is not None]
        whole = parts[-1].model_copy(
            update={
                name: np.concatenate([getattr(part, name) for part in parts])
                for name in ("token_ids", "temperatures", "logprobs", "model_logprobs")
            }
        )
        assert whole.temperatures == pytest.approx(expected_temperatures(FAST, 30), abs=1e-6)
        check_against_reference(whole, reference)


def test_every_worker_checks_schedules(restless: ServerProcess) -> None:
    for _ in range(12):
        with Client(restless.url, timeout=60) as client:
            with pytest.raises(RequestRefused, match=r"annealing\.tau_max"):
                client.complete("hi", annealing={"tau_max": 99}, max_tokens=1)
            assert client.complete("hi", annealing=FAST, max_tokens=1).choices
    assert httpx.get(f"{restless.url}/health", timeout=10).status_code == 200


def test_several_workers_die_together_come_back_and_end_in_time(restless: ServerProcess) -> None:
    """As one does, see test_guard.py; and the worker that is done first does not end the other."""

    def ask(tokens: int, n: int = 12) -> Rollouts:
        with Client(restless.url, retries=0, timeout=120) as client:  # any of the workers
            return client.rollouts(
                ["x"], n=n, annealing=FAST, max_new_tokens=tokens, ignore_eos=True
            )

    with Client(restless.url, timeout=60) as client, ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(ask, 900) for _ in range(6)]
        wait_for(lambda: begins(client), 30)
        family = psutil.Process(restless.process.pid).children(recursive=True)
        (scheduler,) = (p for p in family if "scheduler" in "".join(p.cmdline()))
        scheduler.kill()
        for call in calls:
            assert isinstance(call.exception(timeout=30), EadError)

        wait_for(lambda: answers_ready(restless), 240)
        for _ in range(12):
            assert len(ask(3).groups[0].answers) == 12
        # one worker's, more than is done in time; the other one has nothing to do
        call = pool.submit(ask, 900, n=48)
        wait_for(lambda: begins(client), 30)
        restless.process.send_signal(signal.SIGTERM)
        reasons = [a.finish_reason for a in call.result(timeout=60).groups[0].answers]
        assert set(reasons) <= {"abort", "length"}
        assert "abort" in reasons
        assert restless.process.wait(timeout=60) == 0
