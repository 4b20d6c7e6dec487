"""Streams that are silent for long, or that end with an error, without a server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from helpers.rollout_calls import answer_of

from ead_cli import train
from ead_client import Client, ConnectionFailed, RequestRefused, ServerUnavailable
from ead_server import media_types
from ead_server.rollouts import job, packing, routes
from ead_server.rollouts.engine import Engine
from ead_server.rollouts.job import Group, Job
from ead_server.rollouts.request import Prompt
from trainer_bridge import SyncConfig, weight_publisher
from trainer_bridge.errors import WeightUpdateFailed
from trainer_bridge.run.config import read_config
from trainer_bridge.run.retries import may_pass

# --- groups that take long -----------------------------------------------------------------------


def streamed(form: str, quiet: int) -> list[bytes]:
    """What is sent of two groups, each of which completes after the stream was quiet so often."""

    async def parts() -> list[bytes]:
        may_end = [asyncio.Event(), asyncio.Event()]

        class Slow(Group):
            async def run(self, engine: Any) -> Group:
                await may_end[self.index].wait()
                self.answers = [answer_of([7] * 3, 0.5)]
                return self

        groups: list[Group] = [Slow(index, Prompt(text="x"), 1, {}) for index in range(2)]
        engine: Any = SimpleNamespace(at_work=lambda: True)
        job = Job(groups, engine, "m")
        found: list[bytes] = []
        waited = 0
        async for part in routes._streamed(job, form, 0.0, keep=False):
            found.append(part)
            waited += part in (packing.QUIET_LINE, packing.quiet_frame())
            if waited == quiet:
                may_end[1].set()
            if waited == 2 * quiet:
                may_end[0].set()
        return found

    return asyncio.run(parts())


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "QUIET_S", 0.02)


def test_a_silent_stream_of_frames_goes_on_and_means_the_same() -> None:
    parts = streamed(media_types.FRAMES, quiet=2)
    assert len(parts) >= 4 + 3

    def served(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=iter(parts))

    with Client("http://x", transport=httpx.MockTransport(served)) as client:
        groups = list(client.stream_rollouts(["a", "b"]))
    assert [group.index for group in groups] == [1, 0]
    assert [len(group.answers) for group in groups] == [1, 1]


def test_a_silent_stream_of_lines_has_no_other_lines() -> None:
    body = b"".join(streamed(media_types.NDJSON, quiet=2))
    lines = [json.loads(line) for line in body.split(b"\n")[:-1]]
    assert [line["object"] for line in lines] == ["rollouts.group"] * 2 + ["rollouts.end"]
    assert [line["index"] for line in lines[:2]] == [1, 0]


@pytest.mark.parametrize(
    ("paused", "silent_s", "at_work"), [(False, 0, True), (True, 0, False), (False, 400, False)]
)
def test_an_engine_that_stands_still_gives_no_sign_of_life(
    paused: bool, silent_s: float, at_work: bool
) -> None:
    manager = SimpleNamespace(is_pause=paused, last_receive_tstamp=time.time() - silent_s)
    engine = Engine.__new__(Engine)
    engine.manager = manager
    assert engine.at_work() is at_work


def test_how_long_a_run_bears_silence_is_a_setting() -> None:
    config = read_config(["server.silence_s=7200"]).server
    assert train._timeout(config).read == 7200
    assert train._timeout(config).connect == 5


# --- broadcasts that the server breaks off -------------------------------------------------------


class StillGroup:
    """A broadcast group in which nothing is sent."""

    name, device, invitation = "group", torch.device("cpu"), {"name": "group"}

    def join(self) -> None:
        pass

    def broadcast(self, tensor: Any) -> None:
        pass

    def close(self) -> None:
        pass


def lines_then(*lines: Any) -> Iterator[bytes]:
    for line in lines:
        yield json.dumps(line).encode() + b"\n"


@pytest.mark.parametrize(
    ("last", "cause", "passes"),
    [
        ({"error": {"message": "broke", "code": 500}}, ServerUnavailable, True),
        ({"error": {"message": "busy", "code": 503}}, ServerUnavailable, True),
        ({"error": {"message": "another update", "code": 409}}, RequestRefused, True),
        ({"error": {"message": "a wrong shape", "code": 400}}, RequestRefused, False),
        (None, ConnectionFailed, True),
    ],
)
def test_an_error_within_a_broadcast_is_mended_like_one_of_another_way(
    last: Any, cause: type[Exception], passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def served(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/weights/manifest":
            return httpx.Response(200, json=[{"name": "w", "dtype": "float32", "shape": [5]}])
        if request.url.path == "/v1/weights":
            state = {"version": "6", "whole": True, "group": None, "device": "cpu"}
            return httpx.Response(200, json={**state, "num_ranks": 1})
        told = [{"do": "join"}, {"do": "receive"}, *([last] if last else [])]
        return httpx.Response(200, content=lines_then(*told))

    monkeypatch.setattr(
        "trainer_bridge.sync.publisher.BroadcastGroup", lambda *_, **__: StillGroup()
    )
    transport = httpx.MockTransport(served)
    with Client("http://x", admin_api_key="x", transport=transport) as client:
        publisher = weight_publisher(client, SyncConfig(transport="distributed"))
        with pytest.raises(WeightUpdateFailed, match="still serves version 6") as failed:
            publisher.publish([("w", torch.ones(5))], 7)
    assert type(failed.value.__cause__) is cause
    assert may_pass(failed.value) is passes
