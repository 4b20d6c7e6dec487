"""A process group to broadcast from, apart from torch.distributed's own groups."""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from ead_client import EadError


class BroadcastGroup:
    """This process, rank 0, and the ranks of a server that makes its side by SGLang's
    `init_custom_process_group`. It stands beside whatever groups train, on whatever backend.

    address, port: where the server finds this process; port 0: any free one. timeout_s: of joining,
    and of one broadcast. Raises EadError when the port is taken or the address is not ours.
    """

    def __init__(
        self,
        backend: Literal["nccl", "gloo"],
        *,
        num_receivers: int,
        address: str,
        port: int,
        timeout_s: float,
    ) -> None:
        self.name = f"ead-{uuid.uuid4().hex}"
        # where a tensor must be
        self.device = torch.device("cuda" if backend == "nccl" else "cpu")
        self._size = 1 + num_receivers
        self._timeout = timedelta(seconds=timeout_s)
        try:
            store = TCPStore(
                address, port, is_master=True, wait_for_workers=False, timeout=self._timeout
            )
        except RuntimeError as error:
            raise EadError(f"cannot listen on {address}:{port}: {error}") from error
        self.invitation = {  # for the server
            "name": self.name,
            "master_address": address,
            "master_port": store.port,
            "backend": backend,
        }
        self._store: TCPStore | None = store
        self._group: Any = None

    def join(self) -> None:
        """Wait until the server has joined. Raises RuntimeError.

        The store's prefixes are those of the server's side: one of SGLang 0.5.23's
        init_custom_process_group, two of torch's _new_process_group_helper, which it calls.
        """
        assert self._store is not None, "closed"
        store = PrefixStore(self.name, self._store)
        for prefix in (self.name, self.device.type):
            store = PrefixStore(f"{prefix}/", store)
        if self.device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            self._group = dist.ProcessGroupNCCL(store, 0, self._size, options)
        else:
            self._group = dist.ProcessGroupGloo(store, 0, self._size, self._timeout)

    def broadcast(self, tensor: Tensor) -> None:
        """Return when every rank has it. tensor: contiguous, on `device`. Raises RuntimeError."""
        self._group.broadcast(tensor, 0).wait(self._timeout)

    def close(self) -> None:
        """What waits in the group fails, here and on the server."""
        group, self._group, self._store = self._group, None, None
        if group is not None:
            group.abort()
