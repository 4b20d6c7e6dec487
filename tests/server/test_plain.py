"""Requests that ask for nothing get from the extended server what plain SGLang gives."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.reference import TINY_FLAGS
from helpers.shapes import shape

from ead_server.launch.process import ServerProcess
from ead_server.launch.serve import with_defaults

MESSAGES = [{"role": "user", "content": "class Sampler"}]
CHAT = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
TEXT = {"model": "tiny", "prompt": ["def ", "class "], "temperature": 0, "max_tokens": 24}
NATIVE = {"max_new_tokens": 24, "temperature": 0}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 3, "n": 2}),
    ("/v1/chat/completions", {**CHAT, "stream": True, "logprobs": True}),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "annealing"}]}),
    ("/v1/completions", TEXT),
    ("/v1/completions", {**TEXT, "logprobs": 2, "echo": True}),
    ("/v1/completions", {**TEXT, "stream": True, "stream_options": {"include_usage": True}}),
    ("/generate", {"text": "rollout", "sampling_params": NATIVE, "return_logprob": True}),
    ("/generate", {"text": ["a", "b"], "sampling_params": NATIVE, "stream": True}),
    ("/generate", {"text": "a", "sampling_params": {"no_such_field": 1}}),
]
# what differs between any two answers: ids, times, and how warm the prefix cache was
VARYING = (
    '"(id|created|cached_tokens|decode_throughput|device|[a-z0-9_]*_(ts|time|latency|wait))": ?'
    '("[^"]*"|[0-9.e+-]+)'
)


@pytest.fixture(scope="module")
def plain_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """SGLang's own launcher with our plugin left out, on the same device and model."""
    arguments = with_defaults(["--model-path", str(tiny_model), *TINY_FLAGS], cpu=True)
    with ServerProcess(
        arguments,
        tmp_path_factory.mktemp("plain") / "server.log",
        command=(sys.executable, "-m", "sglang.launch_server"),
        environ={"SGLANG_PLUGINS": "none"},
    ) as process:
        process.wait_until_ready()
        yield process


def answer(url: str, route: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and body without what varies; of a stream, what does not depend on timing."""
    response = httpx.post(url + route, json=body, timeout=60)
    text = re.sub(VARYING, r'"\1": "*"', response.text)
    if not body.get("stream"):
        return response.status_code, json.loads(text)
    *events, done = [line[len("data: ") :] for line in text.split("\n\n") if line]
    assert done == "[DONE]"
    return response.status_code, summary([json.loads(event) for event in events])


def summary(chunks: list[dict[str, Any]]) -> Any:
    """How many tokens share a chunk is a matter of timing; keys, texts and endings are not."""
    texts: dict[int, str] = {}
    endings = []
    for chunk in chunks:
        for choice in chunk.get("choices", []):
            piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + piece
            if choice["finish_reason"]:
                endings.append((choice["index"], choice["finish_reason"]))
        if "output_ids" in chunk:  # /generate: everything so far
            texts[chunk["index"]] = chunk["text"]
    return sorted({shape(chunk) for chunk in chunks}), sorted(texts.items()), sorted(endings)


def differences(left: Any, right: Any, at: str = "") -> list[str]:
    """Where two JSON values differ; not in the last digits of floats, which depend on who shared
    a batch."""
    if isinstance(left, dict) and isinstance(right, dict):
        if list(left) != list(right):
            return [f"{at}: {list(left)} and {list(right)}"]
        return [d for key in left for d in differences(left[key], right[key], f"{at}.{key}")]
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        if len(left) != len(right):
            return [f"{at}: {len(left)} and {len(right)} entries"]
        pairs = enumerate(zip(left, right, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{at}[{i}]")]
    if isinstance(left, float) and isinstance(right, float):
        return [] if math.isclose(left, right, abs_tol=1e-4) else [f"{at}: {left} and {right}"]
    return [] if left == right else [f"{at}: {left!r} and {right!r}"]


def test_greedy_answers_are_identical_field_for_field(
    plain_server: ServerProcess, server: ServerProcess
) -> None:
    for route, body in REQUESTS:
        status, expected = answer(plain_server.url, route, body)
        got_status, got = answer(server.url, route, body)
        assert got_status == status
        assert shape(got) == shape(expected)
        assert differences(got, expected) == [], (route, body)


def test_a_bad_value_is_told_without_the_servers_files(
    plain_server: ServerProcess, server: ServerProcess
) -> None:
    """The one answer that is not SGLang's: its own names the file and line of the route."""
    body = {**TEXT, "max_tokens": -1}
    theirs = httpx.post(f"{plain_server.url}/v1/completions", json=body, timeout=60)
    ours = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert ours.status_code == theirs.status_code == 400
    assert "http_server.py" in theirs.text  # or there is no reason any more
    error = ours.json()["error"]
    assert error["param"] == "max_tokens"
    assert error["message"].endswith("got -1")


def test_neighbours_that_anneal_change_nothing(
    plain_server: ServerProcess, server: ServerProcess
) -> None:
    """The same greedy requests while annealed ones share their batches.

    A greedy row of a mixed batch has its returned log-probabilities computed by another kernel
    (in plain SGLang as well), so texts and tokens are compared, not those digits.
    """
    schedule = {"tau_max": 1.5, "tau_min": 0.3, "decay": 20.0, "warmup": 3}

    def anneal(index: int) -> None:
        body = {**CHAT, "temperature": 1, "annealing": schedule, "max_tokens": 60, "n": 4}
        assert answer(server.url, "/v1/chat/completions", body)[0] == 200

    body = {**CHAT, "return_meta_info": True}
    expected = httpx.post(f"{plain_server.url}/v1/chat/completions", json=body, timeout=60).json()
    with ThreadPoolExecutor(5) as pool:
        neighbours = [pool.submit(anneal, index) for index in range(4)]
        for _ in range(6):
            got = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
            assert got["choices"][0]["message"] == expected["choices"][0]["message"]
            assert set(got["choices"][0]) == set(expected["choices"][0])
            meta, plain_meta = (a["choices"][0]["meta_info"] for a in (got, expected))
            assert set(meta) == set(plain_meta)
        for neighbour in neighbours:
            neighbour.result()
