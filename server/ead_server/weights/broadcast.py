"""Weights that a trainer broadcasts, straight into the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ead_server.errors import NothingLoaded, WeightsRefused
from ead_server.weights.manifest import Spec

Bucket = Sequence[tuple[str, Spec]]

CONNECT_SECONDS = 5.0  # to the trainer, before the engine waits for it


class ProcessGroup(BaseModel):
    """A process group, to which the trainer, its rank 0, listens. Each new one has a new name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=200)
    master_address: str
    master_port: int = Field(ge=1, le=65535)
    backend: Literal["nccl", "gloo"]


class BroadcastReceiver:
    """The server's side. manager: SGLang's TokenizerManager. group: the one that was joined."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self.group: ProcessGroup | None = None

    @property
    def num_ranks(self) -> int:
        """Processes that a broadcast goes to."""
        return int(self.manager.server_args.tp_size)

    async def load(self, buckets: Sequence[Bucket], say: Callable[[str], None]) -> None:
        """Receive and load every bucket, from the group that was joined. Raises NothingLoaded, and
        RuntimeError when some of it was loaded."""
        from sglang.srt.managers.io_struct import (
            BeginWeightUpdateReqInput,
            EndWeightUpdateReqInput,
            UpdateWeightsFromDistributedReqInput,
        )

        manager = self.manager
        assert self.group is not None
        opened, message = await manager.begin_weight_update(BeginWeightUpdateReqInput())
        if not opened:
            raise NothingLoaded(message)
        whole = False
        try:
            say("receive")
            for number, bucket in enumerate(buckets):
                request = UpdateWeightsFromDistributedReqInput(
                    names=[name for name, _ in bucket],
                    dtypes=[spec.dtype for _, spec in bucket],
                    shapes=[list(spec.shape) for _, spec in bucket],
                    group_name=self.group.name,
                    load_format="flattened_bucket",
                    flush_cache=False,
                )
                success, message = await manager.update_weights_from_distributed(request)
                if not success:
                    # of several ranks, others may have received it
                    nothing = number == 0 and self.num_ranks == 1 and "to receive" in message
                    raise NothingLoaded(message) if nothing else RuntimeError(message)
            whole = True
        finally:
            end = EndWeightUpdateReqInput()
            if whole:
                await manager.end_weight_update(end)
            else:  # not that: it counts as a step of training, see ead_server.hooks
                await manager._weight_update_session_call(
                    manager.end_weight_update_communicator, end
                )

    async def join(self, group: ProcessGroup, say: Callable[[str], None]) -> None:
        """Make the group with the trainer that listens. Raises WeightsRefused."""
        from sglang.srt.managers.io_struct import InitWeightsUpdateGroupReqInput

        await self.leave()
        address = group.master_address, group.master_port
        try:  # the engine would wait for half an hour
            async with asyncio.timeout(CONNECT_SECONDS):
                _, writer = await asyncio.open_connection(*address)
            writer.close()
        except OSError as error:  # TimeoutError is one
            message = f"no trainer at {address[0]}:{address[1]}: {error or 'no answer'}"
            raise WeightsRefused(message, field="group") from None
        say("join")
        success, message = await self.manager.init_weights_update_group(
            InitWeightsUpdateGroupReqInput(
                group_name=group.name,
                master_address=group.master_address,
                master_port=group.master_port,
                rank_offset=1,
                world_size=1 + self.num_ranks,
                backend=group.backend,
            )
        )
        if not success:
            raise WeightsRefused(message, field="group")
        self.group = group

    async def leave(self) -> None:
        """The group's end, and that of a broadcast in progress."""
        from sglang.srt.managers.io_struct import DestroyWeightsUpdateGroupReqInput

        group, self.group = self.group, None
        if group is not None:
            request = DestroyWeightsUpdateGroupReqInput(group_name=group.name)
            await self.manager.destroy_weights_update_group(request)
