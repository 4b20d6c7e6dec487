"""One process, or the several of `torchrun`: what the trainer needs of them.

Rank 0 speaks to the server, scores, writes files; all ranks compute. The objects that travel here
are the trainer's own, between processes of one run.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def join(timeout_s: float = 1800.0) -> torch.device:
    """Become one of the ranks that `torchrun` started, if it did; the device of this one.

    timeout_s: how long a rank waits for the others, rank 0's waiting for the server included.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
        device = torch.device("cuda", local)
    else:
        device = torch.device("cpu")
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_s),
        )
    return device


def leave() -> None:
    """End what `join` began."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast(value: T | None) -> T:
    """Rank 0's value, on every rank."""
    values: list[Any] = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    result: T = values[0]
    return result


def gather(value: T) -> list[T]:
    """Every rank's value, by rank."""
    values: list[Any] = [value]
    if dist.is_initialized():
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def shard(model: torch.nn.Module, layers: Any) -> None:
    """Divide the weights among the ranks (FSDP2), layer by layer; nothing with one rank."""
    if not dist.is_initialized():
        return
    from torch.distributed.fsdp import fully_shard

    for layer in layers:
        fully_shard(layer)
    # the root keeps embedding and head whole from the forward to the backward pass, since the
    # log-probabilities' backward pass computes with the head again
    fully_shard(model, reshard_after_forward=False)
