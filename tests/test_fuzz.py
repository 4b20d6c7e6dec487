"""Random bodies on every route that generates or sets something: no 5xx, no stack trace, and a
server that is alive and exact afterwards.

EAD_FUZZ_CASES sets how many; each is a valid body with one to three random changes, or raw bytes.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import random
from typing import Any

import httpx
from conftest import Reference
from test_rollouts import wait_until_idle
from test_server import FAST, check_against_reference

from ead_client import Client
from ead_server.process import ServerProcess

CASES = int(os.environ.get("EAD_FUZZ_CASES", "1500"))
SCHEDULES: list[Any] = [
    {"preset": "paper", "step": 3},
    {"schedule": "piecewise", "knots": [[0, 1.2], [9, 0.4]]},
    {"schedule": "branch", "top": 0.3},
    {
        "schedule": "segment",
        "thinking": {"schedule": "linear", "length": 9.0},
        "answer": {"schedule": "constant", "tau": 0.5},
        "end_of_thinking_token_ids": [2],
    },
]
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
NATIVE = {"max_new_tokens": 3, "stop": ["zz"], "top_p": 0.9}
ROUTES: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "n": 2}),
    ("POST", "/v1/completions", {"model": "m", "prompt": ["a", "b"], "max_tokens": 3, "n": 2}),
    ("POST", "/v1/completions", {"model": "m", "prompt": [5, 6], "max_tokens": 3, "stop": "x"}),
    ("POST", "/generate", {"text": "a", "sampling_params": NATIVE, "return_logprob": True}),
    ("POST", "/generate", {"input_ids": [[5], [6]], "sampling_params": NATIVE}),
    (
        "POST",
        "/v1/rollouts",
        {
            "prompts": ["a", [5, 6], {"text": "b", "n": 1, "prefix_token_ids": [7]}],
            "n": 2,
            "entropies": True,
            "sampling_params": NATIVE,
        },
    ),
    ("PUT", "/v1/annealing", {"annealing": None, "step": 2}),
    ("PUT", "/v1/annealing/step", {"step": 2}),
]
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    0.5,
    10**6,
    2**31,
    2**63,
    10**30,
    1e308,
    -1e-9,
    "",
    "x",
    "\x00\ud7ff",
    "nan",
    "ead",
    "json_object",
    [],
    {},
    [[]],
    [None],
    [1, "a"],
    {"a": {"b": [1]}},
    ["s"] * 40,
    [[1, 2], [3, 4]],
]


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    if isinstance(value, (dict, list)):
        keys = value if isinstance(value, dict) else range(len(value))
        return [at, *(p for key in keys for p in places(value[key], (*at, key)))]
    return [at]


def changed(body: Any, draw: random.Random) -> Any:
    """The body with one place made odd, dropped, or another field added next to it."""
    *parents, last = draw.choice(places(body)[1:])
    parent = body
    for key in parents:
        parent = parent[key]
    what = draw.random()
    if what < 0.6:
        parent[last] = copy.deepcopy(draw.choice(ODD))
    elif what < 0.8:
        del parent[last]
    elif isinstance(parent, dict):
        name = draw.choice(["temperature", "top_k", "n", "stream", "rollout", "rid", "annealing"])
        parent[name] = copy.deepcopy(draw.choice(ODD))
    return body


def case(draw: random.Random) -> tuple[str, str, bytes]:
    method, path, body = copy.deepcopy(draw.choice(ROUTES))
    if path.startswith("/v1/annealing") is False and draw.random() < 0.6:
        schedule = copy.deepcopy(draw.choice(SCHEDULES))
        if path == "/generate":
            body["sampling_params"]["annealing"] = schedule
        else:
            body["annealing"] = schedule
    for _ in range(draw.randint(1, 3)):
        if len(places(body)) > 1:
            body = changed(body, draw)
    text = json.dumps(body).encode()
    if draw.random() < 0.1:  # not even JSON
        at = draw.randrange(len(text))
        junk = draw.choice([b"\x00", b"\xff\xfe", b"NaN", b"[" * 3000, b"", b"1e999", b'"'])
        text = text[:at] + junk + text[at + draw.randint(0, 3) :]
    return method, path, text


def test_no_body_gets_a_5xx_or_harms_the_server(
    server: ServerProcess, client: Client, reference: Reference
) -> None:
    draw = random.Random(0)
    headers = {"content-type": "application/json", **server.admin_headers}
    wrong: list[str] = []

    async def everything() -> None:
        gate = asyncio.Semaphore(16)
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=120) as http:

            async def one(method: str, path: str, body: bytes) -> None:
                async with gate:
                    answer = await http.request(method, path, content=body)
                text = answer.text
                if answer.status_code >= 500 or "Traceback" in text or 'File "' in text:
                    wrong.append(f"{answer.status_code} {path} {body[:300]!r} -> {text[:300]}")

            await asyncio.gather(*(one(*case(draw)) for _ in range(CASES)))

    try:
        asyncio.run(everything())
    finally:
        reset = {"annealing": None, "step": None}
        client.request("PUT", "/v1/annealing", reset, admin=True)
    assert wrong == []
    wait_until_idle(client)
    answer = client.rollouts(["def "], n=2, annealing=FAST, max_new_tokens=10, ignore_eos=True)
    for choice in answer.groups[0].answers:
        assert choice.rollout is not None
        check_against_reference(choice.rollout, reference)
