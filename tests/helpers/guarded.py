"""Servers with keys: what tests of them have in common."""

from __future__ import annotations

from typing import Any

import httpx

from ead_client import Client
from ead_server.launch.process import ServerProcess

KEY = "an-api-key-that-must-not-show"

ADMIN_ROUTES = [
    ("POST", "/update_weights_from_disk"),
    ("POST", "/update_weights_from_tensor"),
    ("POST", "/init_weights_update_group"),
    ("POST", "/begin_weight_update"),
    ("GET", "/get_weights_by_name"),
    ("POST", "/abort_request"),
    ("POST", "/pause_generation"),
    ("POST", "/continue_generation"),
    ("GET", "/flush_cache"),
    ("POST", "/start_profile"),
    ("POST", "/set_internal_state"),
    ("POST", "/load_lora_adapter"),
    ("POST", "/configure_logging"),
    ("POST", "/scale_elastic_ep"),
    ("POST", "/open_session"),
    ("GET", "/close_session"),
    ("PUT", "/v1/annealing"),
    ("PUT", "/v1/annealing/step"),
    ("POST", "/v1/weights/tensors"),
    ("POST", "/v1/weights/disk"),
    ("POST", "/v1/weights/distributed"),
]


def ask(
    server: ServerProcess, method: str, path: str, key: str | None = KEY, **options: Any
) -> httpx.Response:
    headers = {"accept-encoding": "identity", **options.pop("headers", {})}
    headers |= {"authorization": f"Bearer {key}"} if key else {}
    return httpx.request(method, server.url + path, headers=headers, timeout=60, **options)


def metric(server: ServerProcess, line: str) -> float:
    text = ask(server, "GET", "/metrics").text
    values = [row.rpartition(" ")[2] for row in text.splitlines() if row.startswith(line + " ")]
    return float(values[0]) if values else 0.0


def answers_ready(server: ServerProcess) -> bool:
    try:
        return httpx.get(f"{server.url}/health/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def begins(client: Client) -> bool:
    """Whether the engine is at work."""
    loads = client.request("GET", "/v1/loads").json()["loads"]
    return any(load["num_running_reqs"] for load in loads)
