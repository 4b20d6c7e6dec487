"""Tensors of the tiny model, changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from helpers.reference import Reference
from torch import Tensor

from trainer_bridge import Policy, SyncConfig

SMALL_BUCKETS = 100_000  # bytes: about ten buckets of the tiny model's 0.8 MB


def config(way: str, folder: Path, **fields: Any) -> SyncConfig:
    return SyncConfig.model_validate(
        {
            "transport": way,
            "folder": folder,
            "bucket_bytes": SMALL_BUCKETS,
            "timeout_s": 30,
            **fields,
        }
    )


def named_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    return Policy(model).named_weights()


def perturbed(reference: Reference, seed: int) -> Any:
    """Another model of the same shapes."""
    model = copy.deepcopy(reference.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model
