"""Calls of /v1/rollouts that tests have in common."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
from helpers.waiting import wait_for

from ead_client import (
    Client,
)

LONG = {"max_new_tokens": 2000, "ignore_eos": True}


def running(client: Client) -> int:
    loads = client.request("GET", "/v1/loads").json()["loads"]
    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)


def wait_until(client: Client, wanted: Any, timeout_s: float = 60.0) -> None:
    wait_for(lambda: wanted(running(client)), timeout_s)


def wait_until_idle(client: Client) -> None:
    wait_until(client, lambda count: count == 0, timeout_s=8.0)


def request_text(client: Client, path: str, body: Any, **headers: str) -> bytes:
    """A POST as it goes over the wire, for who treats its connection as no client would."""
    request = httpx.Request("POST", f"{client.base_url}{path}", json=body, headers=headers)
    head = [f"POST {path} HTTP/1.1".encode(), *(b": ".join(one) for one in request.headers.raw)]
    return b"\r\n".join([*head, b"", request.content])


def answer_of(token_ids: list[int], tau: float) -> dict[str, Any]:
    numbers = np.linspace(-1, 0, len(token_ids), dtype=np.float32)
    columns = dict.fromkeys(("logprobs", "model_logprobs"), numbers)
    return {
        "text": "t",
        "error": None,
        "token_ids": np.asarray(token_ids, np.int32),
        "temperatures": np.full(len(token_ids), tau, np.float32),
        "finish_reason": "stop",
        "weight_version": "1",
        "weight_versions": None,
        "cached_tokens": 0,
        "annealing": None,
        "sampling": None,
        **columns,
    }
