"""SGLang's router before two servers: what passes it, what does not, and what the end of a server
means to the clients. In this order: the last two tests end servers."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import httpx
import numpy as np
import openai
import psutil
import pytest
from helpers.guarded import KEY, answers_ready, metric
from helpers.reference import TINY_FLAGS, Reference
from helpers.serving import FAST, check_against_reference, expected_temperatures
from helpers.waiting import wait_for

from ead_client import (
    Client,
    ConnectionFailed,
    RequestRefused,
    Rollout,
    ServerUnavailable,
)
from ead_server.launch.process import HOST, ServerProcess, hold_port

# The router as in an environment of its own: it imports sglang where it finds one, which without a
# GPU fails unless ead_sampler/device.py has been there first.
ROUTER = (
    "import sys; sys.modules['sglang'] = None; from sglang_router.launch_router import main; main()"
)
MESSAGES = [{"role": "user", "content": "hello"}]
HEADERS = {"authorization": f"Bearer {KEY}"}


class Fleet(NamedTuple):
    """A router and the servers behind it, which ask for an API key, as the router then does."""

    router: ServerProcess
    workers: tuple[ServerProcess, ServerProcess]

    def client(self, **options: Any) -> Client:
        return Client(self.router.url, api_key=KEY, timeout=120, **options)

    def healthy(self) -> int:
        return int(httpx.get(f"{self.router.url}/readiness").json().get("healthy_workers", 0))

    def running(self) -> list[int]:
        """Requests at work, by server."""
        loads = [httpx.get(f"{w.url}/v1/loads", headers=HEADERS).json() for w in self.workers]
        return [load["loads"][0]["num_running_reqs"] for load in loads]

    def served(self, schedule: str) -> list[float]:
        """Requests answered so far, by server."""
        return [metric(w, f'ead_requests_total{{schedule="{schedule}"}}') for w in self.workers]


@pytest.fixture(scope="module")
def fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    serve = ["--model-path", str(tiny_model), *TINY_FLAGS, "--restart"]
    # two servers on the cores of one: threads that wait for each other would take most of the time
    environ = {"EAD_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    with ExitStack() as started:
        first, second = (
            started.enter_context(ServerProcess(serve, folder / f"{name}.log", environ=environ))
            for name in ("first", "second")
        )
        first.wait_until_ready()
        second.wait_until_ready()
        with hold_port(HOST) as held:
            metrics_port = str(held.getsockname()[1])
        route = ["--worker-urls", first.url, second.url, "--api-key", KEY]
        route += ["--policy", "round_robin", "--shutdown-grace-period-secs", "1"]
        route += ["--prometheus-host", HOST, "--prometheus-port", metrics_port]
        # how soon a server that is back is used again
        route += ["--health-check-interval-secs", "1", "--cb-timeout-duration-secs", "2"]
        router = started.enter_context(
            ServerProcess(route, folder / "router.log", command=(sys.executable, "-c", ROUTER))
        )
        router.wait_until_ready()
        fleet = Fleet(router, (first, second))
        wait_for(lambda: fleet.healthy() == 2, 30)
        yield fleet


def streamed(client: Client, content: str, schedule: dict[str, Any], tokens: int) -> Rollout:
    """A chat's rollout, put together from its chunks."""
    chunks = [
        choice.rollout
        for chunk in client.stream_chat(
            [{"role": "user", "content": content}],
            annealing=schedule,
            max_tokens=tokens,
            ignore_eos=True,
        )
        for choice in chunk.choices
        if choice.rollout is not None
    ]
    names = ("token_ids", "temperatures", "logprobs", "model_logprobs")
    columns = {n: np.concatenate([getattr(chunk, n) for chunk in chunks]) for n in names}
    return chunks[-1].model_copy(update=columns)


def check(
    rollout: Rollout | None, schedule: dict[str, Any], tokens: int, reference: Reference
) -> None:
    assert rollout is not None
    assert len(rollout) == tokens
    assert np.abs(rollout.temperatures - expected_temperatures(schedule, tokens)).max() < 1e-6
    check_against_reference(rollout, reference)


# --- what passes, and what does not --------------------------------------------------------------


def test_our_fields_pass_the_router_both_ways(fleet: Fleet, reference: Reference) -> None:
    with fleet.client() as client:
        answer = client.complete(
            ["def ", "class "], annealing=FAST, n=2, max_tokens=12, ignore_eos=True
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        answer_of_chat = client.chat(
            MESSAGES, annealing=FAST, rollout={"entropies": True}, max_tokens=12, ignore_eos=True
        )
        for choice in (*answer.choices, *answer_of_chat.choices):
            check(choice.rollout, FAST, 12, reference)
        assert answer_of_chat.choices[0].rollout is not None
        assert answer_of_chat.choices[0].rollout.entropies is not None
        check(streamed(client, "hello", FAST, 12), FAST, 12, reference)
        for call in (
            lambda: client.complete("x", annealing={"tau_max": 99}),
            lambda: client.chat(MESSAGES, annealing={"tau_max": 99}),
        ):
            with pytest.raises(RequestRefused, match=r"annealing\.tau_max.*got 99") as refused:
                call()
            assert refused.value.param == "annealing.tau_max"


@pytest.mark.parametrize("stream", [False, True])
def test_the_openai_client_gets_its_temperatures_through_the_router(
    fleet: Fleet, stream: bool
) -> None:
    with openai.OpenAI(base_url=f"{fleet.router.url}/v1", api_key=KEY) as official:
        sent: dict[str, Any] = {"model": "m", "max_tokens": 8, "stream": stream}
        text = official.completions.create(
            prompt="def ", extra_body={"annealing": FAST, "ignore_eos": True}, **sent
        )
        chat = official.chat.completions.create(
            messages=MESSAGES,
            extra_body={"chat_template_kwargs": {"annealing": FAST}, "ignore_eos": True},
            **sent,
        )
        for answer in (text, chat):
            choices = [part.choices[0] for part in (answer if stream else [answer])]
            rollouts = [choice.rollout for choice in choices if hasattr(choice, "rollout")]
            temperatures = [tau for rollout in rollouts for tau in rollout["temperatures"]]
            assert temperatures == pytest.approx(expected_temperatures(FAST, 8), abs=1e-6)


def test_what_the_router_drops_leaves_no_marker_and_what_it_has_not_is_an_error(
    fleet: Fleet,
) -> None:
    """If one of these fails, the router has learnt something, and README can say so."""

    def post(path: str, body: dict[str, Any]) -> Any:
        response = httpx.post(fleet.router.url + path, json=body, headers=HEADERS, timeout=60)
        assert response.status_code == 200
        return response.json()

    chat = {"model": "m", "messages": MESSAGES, "max_tokens": 3, "annealing": FAST}
    assert "rollout" not in post("/v1/chat/completions", chat)["choices"][0]
    for place in ({"annealing": FAST}, {"custom_params": {"annealing": FAST}}):
        native = {"text": "x", "sampling_params": {"max_new_tokens": 3, **place}}
        assert not {"annealing", "temperatures"} & set(post("/generate", native)["meta_info"])
    with fleet.client() as client:
        with pytest.raises(RequestRefused, match="SGLang's router passes none on"):
            client.rollouts(["x"], annealing=FAST)
        with pytest.raises(RequestRefused, match="HTTP 422"):
            client.complete([5, 6, 7], annealing=FAST)
    with (
        Client(fleet.router.url, api_key="wrong") as client,
        pytest.raises(RequestRefused, match="HTTP 401: Unauthorized"),
    ):
        client.complete("x")


def test_both_servers_work_and_nothing_is_mixed_up(fleet: Fleet, reference: Reference) -> None:
    def schedule(index: int) -> dict[str, Any]:
        return {"schedule": "linear", "tau_max": 1.5, "tau_min": 0.5, "length": 5.0 + index}

    def one(index: int) -> Rollout | None:
        with fleet.client() as client:
            if index % 3 == 2:
                return streamed(client, f"request {index}", schedule(index), 10 + index)
            answer = client.complete(
                f"request {index}",
                annealing=schedule(index),
                max_tokens=10 + index,
                ignore_eos=True,
            )
            return answer.choices[0].rollout

    before = fleet.served("linear")
    with ThreadPoolExecutor(24) as pool:
        rollouts = list(pool.map(one, range(24)))
    for index, rollout in enumerate(rollouts):
        assert rollout is not None
        assert f"request {index}" in reference.tokenizer.decode(rollout.prompt_token_ids)
        t = np.arange(10 + index)
        assert np.abs(rollout.temperatures - (1.5 - np.minimum(t / (5.0 + index), 1))).max() < 1e-6
        check_against_reference(rollout, reference)
    each = np.subtract(fleet.served("linear"), before)
    assert each.sum() == 24
    assert min(each) >= 8  # 12, but for what the router itself sent again


# --- a server that dies, and one that is told to end ---------------------------------------------


def test_a_killed_server_costs_the_streams_that_it_had_begun_and_comes_back(
    fleet: Fleet, reference: Reference
) -> None:
    """Four whole answers and four streams at work, half of each on the server that is killed."""
    tokens = 1500
    first = fleet.workers[0]
    fields = {"annealing": FAST, "max_tokens": tokens, "ignore_eos": True}
    with fleet.client(retries=0) as client, ThreadPoolExecutor(8) as pool:
        wholes = [pool.submit(client.complete, f"def f{i}", **fields) for i in range(4)]
        wait_for(lambda: fleet.running() == [2, 2], 30)
        streams = [pool.submit(streamed, client, f"{i}", FAST, tokens) for i in range(4)]
        wait_for(lambda: fleet.running() == [4, 4], 30)
        (serving,) = psutil.Process(first.process.pid).children()  # the other one starts it again
        serving.kill()

        for whole in wholes:  # the router sends those of the killed server to the other one
            check(whole.result(timeout=120).choices[0].rollout, FAST, tokens, reference)
        errors = [stream.exception(timeout=120) for stream in streams]
        assert [type(error) for error in errors if error] == [ConnectionFailed] * 2
        for stream, error in zip(streams, errors, strict=True):
            if error is None:
                check(stream.result(), FAST, tokens, reference)

        for index in range(12):  # and all goes on
            check(streamed(client, f"{index}", FAST, 5), FAST, 5, reference)
        wait_for(lambda: answers_ready(first), 240)

        def works_again() -> bool:
            client.complete("x", annealing=FAST, max_tokens=2)
            return fleet.served("ead")[0] > 0

        wait_for(works_again, 60)


def test_a_server_that_is_told_to_end_costs_nothing(fleet: Fleet) -> None:
    """Clients without any retries of their own, while it drains, ends and is gone."""
    gone = Event()

    def ask(number: int) -> int:
        count = 0
        with fleet.client(retries=0) as client:
            while not gone.is_set() or count < 20:
                if number % 2:
                    assert len(streamed(client, f"{number} {count}", FAST, 20)) == 20
                else:
                    answer = client.complete("x", annealing=FAST, max_tokens=20, ignore_eos=True)
                    assert answer.choices[0].rollout is not None
                count += 1
        return count

    first, second = fleet.workers
    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(ask, number) for number in range(6)]
        try:
            wait_for(lambda: min(fleet.running()) > 0, 60)
            second.process.send_signal(signal.SIGTERM)
            assert second.process.wait(timeout=60) == 0
        finally:
            gone.set()
        for call in calls:
            assert call.result(timeout=120) >= 20

    with fleet.client(retries=0) as client:
        first.stop()
        with pytest.raises(ServerUnavailable):
            client.complete("x")
