"""Many clients at once: none is lost, mixed up or stuck."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx
import numpy as np
import pytest
from helpers.reference import Reference
from helpers.rollout_calls import wait_until
from helpers.serving import check_against_reference, expected_temperatures

from ead_client import AsyncClient, Client, Rollout

CLIENTS = 512
TOKENS = 12


def wait_until_idle(client: Client) -> None:
    """However long a slow machine takes for what was begun: the question here is what is left."""
    wait_until(client, lambda count: count == 0, timeout_s=120.0)


def schedule_of(index: int) -> dict[str, Any]:
    """One of 512 that differ from each other from the second token on."""
    return {"schedule": "linear", "tau_max": 1.5, "tau_min": 0.5, "length": 10.0 + index, "step": 0}


async def stream_one(client: AsyncClient, index: int, leave_after: int | None) -> Rollout | None:
    """The whole answer, put together from its chunks; None when the client leaves before."""
    columns: dict[str, list[float]] = {}
    last: Rollout | None = None
    messages = [{"role": "user", "content": f"request {index}"}]
    stream = client.stream_chat(
        messages, annealing=schedule_of(index), max_tokens=TOKENS, ignore_eos=True
    )
    chunks = 0
    async for chunk in stream:
        for choice in chunk.choices:
            if choice.rollout is None:
                continue
            last = choice.rollout
            for name in ("token_ids", "temperatures", "logprobs", "model_logprobs"):
                columns.setdefault(name, []).extend(getattr(last, name).tolist())
        chunks += 1
        if chunks == leave_after:
            await stream.aclose()  # type: ignore[attr-defined]
            return None
        if index % 50 == 7:
            await asyncio.sleep(0.05)  # a slow reader
    assert last is not None
    return last.model_copy(update={n: np.asarray(c) for n, c in columns.items()})


def test_512_streams_at_once_each_get_their_own(client: Client, reference: Reference) -> None:
    """One in eight leaves early, some read slowly; who stays gets every token of its schedule."""
    leaves = {i: 1 + i % 5 for i in random.Random(0).sample(range(CLIENTS), CLIENTS // 8)}

    async def everyone() -> list[Rollout | None]:
        limits = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=CLIENTS))
        async with AsyncClient(client.base_url, timeout=300, transport=limits) as shared:
            calls = (stream_one(shared, i, leaves.get(i)) for i in range(CLIENTS))
            return await asyncio.gather(*calls)

    answers = asyncio.run(everyone())
    for index, rollout in enumerate(answers):
        if index in leaves:
            continue
        assert rollout is not None
        assert len(rollout.token_ids) == TOKENS
        want = expected_temperatures_of(index)
        assert np.abs(rollout.temperatures - want).max() < 1e-6
    for index in (1, 100, 300, 511):
        rollout = answers[index]
        if rollout is not None:  # also the prompt and the log-probabilities are this request's
            assert f"request {index}" in reference.tokenizer.decode(rollout.prompt_token_ids)
            check_against_reference(rollout, reference)
    wait_until_idle(client)


def expected_temperatures_of(index: int) -> np.ndarray[Any, Any]:
    t = np.arange(TOKENS)
    return 1.5 - np.minimum(t / (10.0 + index), 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_aborted_calls_leaves_the_server_exact(
    client: Client, reference: Reference, seed: int
) -> None:
    """60 rollout calls, most of them cancelled at random moments; the rest are right."""
    draw = random.Random(seed)
    schedule = {"tau_max": 1.5, "tau_min": 0.3, "decay": 20.0, "warmup": 3, "step": 0}

    async def one(shared: AsyncClient, patience: float | None) -> Any:
        call = shared.rollouts(
            ["def "], n=2, annealing=schedule, max_new_tokens=40, ignore_eos=True
        )
        try:
            return await asyncio.wait_for(call, patience)
        except TimeoutError:
            return None

    async def storm() -> list[Any]:
        async with AsyncClient(client.base_url, timeout=120, retries=0) as shared:
            patience = [None if i % 6 == 0 else draw.uniform(0.01, 1.0) for i in range(60)]
            return await asyncio.gather(*(one(shared, p) for p in patience))

    done = [answer for answer in asyncio.run(storm()) if answer is not None]
    assert len(done) >= 10
    for answer in done:
        for choice in answer.groups[0].answers:
            assert choice.rollout is not None
            assert len(choice.rollout) == 40
            want = expected_temperatures(schedule, 40)
            assert np.abs(choice.rollout.temperatures - want).max() < 1e-6
    check_against_reference(done[-1].groups[0].answers[0].rollout, reference)
    wait_until_idle(client)


BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 300,
        "stream": True,
    },
    "/v1/completions": {"model": "m", "prompt": ["x", "y"], "max_tokens": 300, "n": 2},
    "/generate": {"text": "x", "sampling_params": {"max_new_tokens": 300}, "stream": True},
    "/v1/rollouts": {"prompts": ["x", "y"], "n": 2, "sampling_params": {"max_new_tokens": 300}},
}


def test_after_a_storm_of_disconnects_no_memory_is_held(client: Client) -> None:
    """200 connections on four routes, each closed within a second. SGLang checks its memory pools
    whenever it is idle, and dies of a leak; here its own count must be 0 as well."""
    draw = random.Random(0)
    calls = [(path, draw.uniform(0.0, 1.0)) for path in BODIES for _ in range(50)]
    draw.shuffle(calls)

    async def one(http: httpx.AsyncClient, path: str, patience: float) -> int:
        """Bytes of the answer that were read."""
        size = 0
        try:
            async with asyncio.timeout(patience), http.stream("POST", path, json=BODIES[path]) as a:
                async for part in a.aiter_raw():
                    size += len(part)
        except TimeoutError:
            return -1
        return size

    async def storm() -> list[int]:
        limits = httpx.Limits(max_connections=len(calls))
        url = client.base_url
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as http:
            return await asyncio.gather(*(one(http, *call) for call in calls))

    left = asyncio.run(storm())
    assert left.count(-1) > 100
    wait_until_idle(client)
    # SGLang waits so many seconds for its scheduler's last step
    assert client.request("POST", "/flush_cache?timeout=60", admin=True).status_code == 200
    (load,) = client.request("GET", "/v1/loads").json()["loads"]
    assert (load["num_used_tokens"], load["num_running_reqs"], load["num_waiting_reqs"]) == (
        0,
        0,
        0,
    )
