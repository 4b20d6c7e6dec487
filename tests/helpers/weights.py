"""Weights of the tiny model, good and spoilt, and the ways to the server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from ead_client import Client

Tensors = dict[str, Tensor]
NORM = "model.norm.weight"  # [64]
UP = "model.layers.1.mlp.up_proj.weight"  # [128, 64]


def tensors_of(model: Path) -> Tensors:
    return load_file(model / "model.safetensors")


def post(client: Client, path: str, **options: Any) -> httpx.Response:
    """With the admin key, and nothing that the client would do besides."""
    headers = dict(client._admin_headers)
    return httpx.post(client.base_url + path, headers=headers, timeout=60, **options)


def post_tensors(client: Client, tensors: Tensors, version: str) -> httpx.Response:
    frame = save(tensors)
    body = len(frame).to_bytes(8, "little") + frame
    return post(client, f"/v1/weights/tensors?version={version}", content=body)


def post_folder(client: Client, folder: Path | str, version: str = "1") -> httpx.Response:
    body = {"version": version, "folder": str(folder)}
    return post(client, "/v1/weights/disk", json=body)


def post_sglang(client: Client, folder: Path | str, **more: Any) -> httpx.Response:
    return post(client, "/update_weights_from_disk", json={"model_path": str(folder), **more})


def save_in(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def message_of(response: httpx.Response, status: int = 400) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["error"]["message"])


def one_nan(tensors: Tensors) -> str:
    tensors[UP] = tensors[UP].clone()
    tensors[UP][77, 3] = torch.nan
    return f"{UP}: every number must be finite"


def one_inf(tensors: Tensors) -> str:
    tensors[NORM] = tensors[NORM].clone()
    tensors[NORM][63] = -torch.inf
    return f"{NORM}: every number must be finite"


BAD_NUMBERS: tuple[Callable[[Tensors], str], ...] = (one_nan, one_inf)
