"""Every wait of an update has an end, whatever clients and ranks do."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from helpers.waiting import wait_for
from helpers.weights import post, post_folder

from ead_client import Client
from ead_server.weights import update
from ead_server.weights.hooks import flush_cache
from ead_server.weights.update import Weights


def running(client: Client) -> int:
    loads = client.request("GET", "/v1/loads").json()["loads"]
    return int(sum(load["num_running_reqs"] for load in loads))


@contextmanager
def reads_nothing(client: Client) -> Iterator[None]:
    """A client of a stream of 50 MB, all of it generated, that never reads any of it."""
    params = {"max_new_tokens": 600, "ignore_eos": True}
    body = {"text": "x", "stream": True, "return_logprob": True, "top_logprobs_num": 20}
    data = json.dumps({**body, "sampling_params": params}).encode()
    url = urlsplit(client.base_url)
    assert url.hostname is not None
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((url.hostname, url.port))
        head = f"POST /generate HTTP/1.1\r\nhost: {url.netloc}\r\ncontent-length: {len(data)}\r\n"
        connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + data)
        wait_for(lambda: running(client) > 0)
        wait_for(lambda: running(client) == 0)
        yield


def test_a_client_that_reads_nothing_holds_up_no_pause(client: Client, tiny_model: Path) -> None:
    with reads_nothing(client):
        body = {"version": "after", "folder": str(tiny_model), "pause": "abort"}
        assert post(client, "/v1/weights/disk", json=body).status_code == 200
        assert client.model_info()["weight_version"] == "after"
        assert post(client, "/pause_generation", json={}).status_code == 200
        assert post(client, "/continue_generation", json={}).status_code == 200
        answer = client.complete("x", rollout=True, max_tokens=3, ignore_eos=True)
        assert answer.choices[0].rollout is not None
        assert post_folder(client, tiny_model, "default").status_code == 200


class Ranks:
    """A manager of an engine whose data-parallel ranks answer in turn what they are told to."""

    def __init__(self, *answers: list[bool]) -> None:
        self.answers = list(answers)
        self.calls: list[str] = []
        self.cleared = 0
        self.is_pause = False
        self.mm_processor = SimpleNamespace(clear_preprocess_cache=self._clear)

    def _clear(self) -> None:
        self.cleared += 1

    def auto_create_handle_loop(self) -> None:
        pass

    async def flush_cache_communicator(self, request: Any) -> list[Any]:
        flushed = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [SimpleNamespace(success=success, message="") for success in flushed]

    async def flush_cache(self) -> Any:
        return await flush_cache(Ranks.flush_cache, self)

    async def pause_generation(self, request: Any) -> None:
        self.calls.append(request.mode)

    async def continue_generation(self, request: Any) -> None:
        self.calls.append("continue")

    def abort_request(self, *, abort_all: bool) -> None:
        self.calls.append("abort")


@pytest.mark.parametrize("flushed", [[True, True], [True, False], [False, True], [False, False]])
def test_every_data_parallel_rank_is_asked(flushed: list[bool]) -> None:
    manager = Ranks(flushed)
    result = asyncio.run(flush_cache(Ranks.flush_cache, manager))
    assert result.success is all(flushed)
    assert manager.cleared == all(flushed)


def test_tries_to_stand_still_are_further_and_further_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    manager = Ranks(*[[True, False]] * 5, [True, True])
    asyncio.run(Weights(manager)._stand_still("retract", paused_by_user=False))
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6])
    assert manager.calls == ["retract", "continue"] * 5 + ["retract"]

    monkeypatch.setattr(update, "BUSY_SECONDS", -1.0)
    manager = Ranks([False, True])
    with pytest.raises(update.WeightsRefused, match="keep the cache from being flushed"):
        asyncio.run(Weights(manager)._stand_still("abort", paused_by_user=False))
    assert manager.calls == ["retract", "abort", "continue"]
