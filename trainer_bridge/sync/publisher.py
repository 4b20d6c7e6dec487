"""New weights to the server, three ways behind one interface.

    tensors      safetensors over HTTP. The server keeps them in files until all are there, and
                 pauses for a load from disk only.
    distributed  broadcasts, NCCL between GPUs and gloo between CPUs, straight into the engine,
                 which is paused meanwhile.
    disk         a folder that both see.

Where only adapters are trained, `tensors` sends only these, and the server merges them.

The server checks all of it before it loads any of it, and never samples from half a version. When
`publish` fails, the error says what is served: the version before, or, after a broadcast that broke
off, nothing until a whole version has come. Publishing again is always safe.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor

from ead_client import Client, ConnectionFailed, EadError
from ead_client._checks import error_of
from ead_client._json import lines_of
from trainer_bridge.errors import WeightUpdateFailed
from trainer_bridge.settings import Settings
from trainer_bridge.sync.broadcast import BroadcastGroup

NamedTensors = Iterable[tuple[str, Tensor]]
_CHUNK = 1 << 20  # bytes that httpx is given at a time; it copies what a send leaves of them


class SyncConfig(Settings):
    """How new weights reach the server."""

    transport: Literal["tensors", "distributed", "disk"] = "tensors"
    pause: Literal["retract", "abort", "in_place"] = Field(
        default="retract",
        description="What becomes of answers in progress. retract: they go on, and each of their "
        "tokens is from one version, by keys and values of that version. abort: they end. in_place:"
        " they go on with the old keys and values, as do new prompts that begin like an old one; "
        "the log-probabilities after it are no version's.",
    )
    adapters: bool = Field(
        default=True,
        description="tensors: of a model.lora, send the adapters alone; false: merged weights",
    )
    bucket_bytes: int = Field(default=128 << 20, ge=1, description="sent at a time")
    folder: Path | None = Field(default=None, description="disk: below the server's --weights-root")
    address: str = Field(default="127.0.0.1", description="distributed: where the server finds us")
    port: int = Field(default=0, ge=0, le=65535, description="distributed: to listen on; 0: any")
    timeout_s: float = Field(default=120, gt=0, description="distributed: of joining, of a bucket")

    @property
    def sends_adapters(self) -> bool:
        """Whether adapters can go alone."""
        return self.adapters and self.transport == "tensors"

    @model_validator(mode="after")
    def _folder_is_given(self) -> SyncConfig:
        if self.transport == "disk" and self.folder is None:
            raise ValueError("folder: must be given for transport 'disk'")
        return self


@dataclass(frozen=True)
class SyncReport:
    """One version that the server now serves."""

    version: str
    seconds: Mapping[str, float]  # by phase; nothing is generated during "pause" and "load"
    num_bytes: int
    num_tensors: int


class _Part(NamedTuple):
    """A tensor that is to be sent, not yet gathered and cast."""

    name: str
    tensor: Tensor
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.tensor.shape.numel() * self.dtype.itemsize

    @property
    def spec(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"name": self.name, "dtype": dtype, "shape": list(self.tensor.shape)}

    def value(self, device: torch.device | str | None = None) -> Tensor:
        gather = getattr(self.tensor, "full_tensor", None)  # of a DTensor
        tensor = self.tensor if gather is None else gather()
        return tensor.detach().to(device, self.dtype).contiguous()


class WeightPublisher:
    """What the three ways share."""

    def __init__(self, client: Client, config: SyncConfig) -> None:
        self.client = client
        self.config = config

    def publish(
        self, tensors: NamedTensors, version: int | str, *, lora_scale: float | None = None
    ) -> SyncReport:
        """Return when the server samples from these weights.

        tensors: all of the model's, named as in its checkpoint (Policy.named_weights), on any
        device; cast to the dtype that is served. A sharded one (DTensor) is gathered when its turn
        comes, which the other ranks have to do with it. With `lora_scale`, adapters
        (Policy.named_adapters) of the checkpoint that the server was started with, which only the
        transport `tensors` can send. Raises WeightUpdateFailed.
        """
        if lora_scale is not None and not self.config.sends_adapters:
            raise ValueError(
                f"lora_scale: adapters do not go by transport {self.config.transport!r}"
            )
        started = time.perf_counter()
        sent: Counter[str] = Counter()
        buckets = self._buckets(tensors, sent, as_they_are=lora_scale is not None)
        try:
            seconds = self._send(buckets, str(version), lora_scale)
        except (EadError, OSError, SafetensorError) as error:
            raise WeightUpdateFailed(str(error), self._serving()) from error
        seconds["total"] = time.perf_counter() - started
        return SyncReport(str(version), seconds, sent["bytes"], sent["tensors"])

    def close(self) -> None:
        """Let go of what is held between publications: nothing, for most."""

    def _send(
        self, buckets: Iterator[list[_Part]], version: str, lora_scale: float | None
    ) -> dict[str, float]:
        """Seconds by phase."""
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.client.request("GET", "/v1/weights", admin=True).json()
        return state

    def _serving(self) -> str | None:
        try:
            state = self._state()
        except EadError:  # it is gone
            return None
        return str(state["version"]) if state["whole"] else None

    def _buckets(
        self, tensors: NamedTensors, sent: Counter[str], *, as_they_are: bool
    ) -> Iterator[list[_Part]]:
        """In the order given, each of one dtype and, unless a tensor is larger, bucket_bytes.

        as_they_are: in their own dtypes. Raises EadError for a tensor that the server does not
        know; it checks the rest.
        """
        if not as_they_are:
            manifest = self.client.request("GET", "/v1/weights/manifest", admin=True).json()
            dtypes = {spec["name"]: getattr(torch, spec["dtype"]) for spec in manifest}
        bucket: list[_Part] = []
        size = 0
        for name, tensor in tensors:
            if not as_they_are and name not in dtypes:
                raise EadError(f"the server's model has no tensor {name!r}")
            part = _Part(name, tensor, tensor.dtype if as_they_are else dtypes[name])
            full = size + part.num_bytes > self.config.bucket_bytes
            if bucket and (full or part.dtype != bucket[0].dtype):
                yield bucket
                bucket, size = [], 0
            bucket.append(part)
            size += part.num_bytes
            sent.update(bytes=part.num_bytes, tensors=1)
        if bucket:
            yield bucket


class TensorPublisher(WeightPublisher):
    """Over HTTP. Takes memory for two buckets."""

    def _send(
        self, buckets: Iterator[list[_Part]], version: str, lora_scale: float | None
    ) -> dict[str, float]:
        query = f"version={quote(version, safe='')}&pause={self.config.pause}"
        route = f"/v1/weights/tensors?{query}"
        if lora_scale is not None:
            route = f"/v1/weights/adapters?{query}&scale={quote(repr(lora_scale))}"
        answer = self.client.request("POST", route, content=_frames(buckets), admin=True)
        seconds: dict[str, float] = answer.json()["seconds"]
        return seconds


def _frames(buckets: Iterator[list[_Part]]) -> Iterator[bytes]:
    """Each bucket as a safetensors file after its length."""
    for bucket in buckets:
        data = save({part.name: part.value("cpu") for part in bucket})
        yield len(data).to_bytes(8, "little")
        for start in range(0, len(data), _CHUNK):
            yield data[start : start + _CHUNK]


class DiskPublisher(WeightPublisher):
    """By a folder, which is gone when `publish` returns."""

    def _send(
        self, buckets: Iterator[list[_Part]], version: str, lora_scale: float | None
    ) -> dict[str, float]:
        assert self.config.folder is not None
        folder = self.config.folder.resolve() / f"weights-{quote(version, safe='')}"
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was stopped here
        started = time.perf_counter()
        try:
            folder.mkdir(parents=True)
            for number, bucket in enumerate(buckets):
                file = folder / f"bucket-{number:05d}.safetensors"
                save_file({part.name: part.value("cpu") for part in bucket}, file)
            write = time.perf_counter() - started
            body = {"folder": str(folder), "version": version, "pause": self.config.pause}
            answer = self.client.request("POST", "/v1/weights/disk", body, admin=True)
            return {"write": write, **answer.json()["seconds"]}
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class DistributedPublisher(WeightPublisher):
    """By broadcasts from this process. Takes memory for a bucket on the tensors' device.

    All shapes are told before the first broadcast, so a generator's tensors are all held at once.
    The group is made at the first `publish`, again when the server is another, and after failures.
    """

    def __init__(self, client: Client, config: SyncConfig) -> None:
        super().__init__(client, config)
        self._group: BroadcastGroup | None = None

    def _send(
        self, buckets: Iterator[list[_Part]], version: str, lora_scale: float | None
    ) -> dict[str, float]:
        whole = list(buckets)
        group = self._joinable_group()
        body = {
            "version": version,
            "pause": self.config.pause,
            "group": group.invitation,
            "buckets": [[part.spec for part in bucket] for bucket in whole],
        }
        try:
            with self.client.stream("/v1/weights/distributed", body, admin=True) as response:
                return self._follow(map(json.loads, lines_of(response.iter_bytes())), group, whole)
        except BaseException:
            self.close()
            raise

    def _follow(
        self, lines: Iterator[dict[str, Any]], group: BroadcastGroup, buckets: list[list[_Part]]
    ) -> dict[str, float]:
        """Do what the server says, until it says how that went."""
        failure: RuntimeError | None = None
        for line in lines:
            if "seconds" in line:
                seconds: dict[str, float] = line["seconds"]
                return seconds
            if "error" in line:
                raise error_of(line, None) from failure  # as the same error outside of a stream
            try:
                if line["do"] == "join":
                    group.join()
                else:
                    for bucket in buckets:
                        values = [part.value(group.device).view(-1) for part in bucket]
                        group.broadcast(torch.cat([value.view(torch.uint8) for value in values]))
            except RuntimeError as error:  # of torch.distributed; the server will say more
                failure = error
                group.close()
        raise ConnectionFailed("the server's answer broke off") from failure

    def _joinable_group(self) -> BroadcastGroup:
        """The group that the server is in, or a new one."""
        state = self._state()
        if self._group is None or self._group.name != state["group"]:
            self.close()
            self._group = BroadcastGroup(
                "gloo" if state["device"] == "cpu" else "nccl",
                num_receivers=state["num_ranks"],
                address=self.config.address,
                port=self.config.port,
                timeout_s=self.config.timeout_s,
            )
        return self._group

    def close(self) -> None:
        """End the group. The next `publish` makes another."""
        group, self._group = self._group, None
        if group is not None:
            group.close()


def weight_publisher(client: Client, config: SyncConfig) -> WeightPublisher:
    """client: with the server's admin key."""
    ways = {"tensors": TensorPublisher, "distributed": DistributedPublisher, "disk": DiskPublisher}
    return ways[config.transport](client, config)
