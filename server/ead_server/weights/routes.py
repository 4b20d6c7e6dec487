"""Routes that replace the weights, and those that say what is served.

    GET  /v1/weights               version, whether it is whole, whether something is generated
    GET  /v1/weights/manifest      name, dtype and shape of every tensor that an update must bring
    POST /v1/weights/tensors       safetensors in the body         ?version=7&pause=retract
    POST /v1/weights/adapters      low-rank factors in the body    ?version=7&scale=2
    POST /v1/weights/disk          safetensors in a folder below --weights-root
    POST /v1/weights/distributed    NCCL or gloo, from the trainer's memory into the engine's

An answer with status 200 says that the new version is served. Any other says why not, and sending
the same again is safe.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from sglang.srt.utils.auth import AuthLevel, auth_level

from ead_server.error_route import OpenAIErrorsRoute
from ead_server.errors import WeightsRefused, openai_error
from ead_server.json_types import Json
from ead_server.media_types import FRAMES, NDJSON
from ead_server.weights.broadcast import ProcessGroup
from ead_server.weights.manifest import Spec
from ead_server.weights.update import Pause, Seconds, Weights, served_weights

Version = Annotated[str, Field(min_length=1, max_length=200)]

log = logging.getLogger(__name__)
router = APIRouter(route_class=OpenAIErrorsRoute, tags=["weights"])
_admin = auth_level(AuthLevel.ADMIN_OPTIONAL)  # as SGLang's own: see edge/guard.py
_running: set[asyncio.Task[Any]] = set()


class Served(BaseModel):
    """What the server has loaded."""

    version: str
    whole: bool = Field(description="false: an update broke off, and nothing is generated")
    standstill: str | None = Field(description="why nothing is generated now; null: it is")
    group: str | None = Field(description="name of the process group for broadcasts, if any")
    num_ranks: int = Field(description="processes that a broadcast goes to")
    device: str = Field(description="where its weights are: cuda, cpu, ...")


class Named(Spec):
    """One tensor."""

    name: str


class Expected(Named):
    """A tensor that an update brings."""

    required: bool = Field(description="false: it may be left out, since SGLang does not load it")


class Updated(BaseModel):
    """Seconds by phase: transfer or join, merge, pause, load."""

    version: str
    seconds: Seconds


class FromDisk(BaseModel):
    """A version that lies in a folder."""

    model_config = ConfigDict(extra="forbid")

    version: Version
    folder: str
    pause: Pause = "retract"


class FromBroadcast(BaseModel):
    """A version that rank 0 of `group` will broadcast, bucket by bucket.

    A bucket's tensors travel as bytes, end to end, in this order.
    """

    model_config = ConfigDict(extra="forbid")

    version: Version
    pause: Pause = "retract"
    group: ProcessGroup
    buckets: list[Annotated[list[Named], Field(min_length=1)]]


@router.get("/v1/weights")
async def read_weights(request: Request) -> Served:
    """What is served."""
    weights = _weights(request)
    return Served(
        version=weights.version,
        whole=weights.broken is None,
        standstill=weights.standstill,
        group=weights.broadcast.group.name if weights.broadcast.group else None,
        num_ranks=weights.broadcast.num_ranks,
        device=weights.manager.server_args.device,
    )


@router.get("/v1/weights/manifest")
async def read_manifest(request: Request) -> list[Expected]:
    """The tensors that an update brings, by their names in the model's checkpoint."""
    weights = _weights(request)
    manifest = await asyncio.to_thread(lambda: weights.manifest)
    return [
        Expected(name=name, dtype=spec.dtype, shape=spec.shape, required=name in manifest.required)
        for name, spec in manifest.specs.items()
    ]


@router.post(
    "/v1/weights/tensors",
    openapi_extra={"requestBody": {"required": True, "content": {FRAMES: {}}}},
)
@_admin
async def update_from_tensors(
    request: Request, version: Annotated[Version, Query()], pause: Pause = "retract"
) -> Updated:
    """The body: safetensors files, each after its length (uint64, little-endian); together, every
    tensor once. It may come slowly: generation goes on until the last byte is there.
    """
    update = _weights(request).from_tensors(request.stream(), version, pause)
    return Updated(version=version, seconds=await _to_its_end(update))


@router.post(
    "/v1/weights/adapters",
    openapi_extra={"requestBody": {"required": True, "content": {FRAMES: {}}}},
)
@_admin
async def update_from_adapters(
    request: Request,
    version: Annotated[Version, Query()],
    scale: Annotated[float, Query(ge=-1e4, le=1e4, allow_inf_nan=False)],
    pause: Pause = "retract",
) -> Updated:
    """The body: as of tensors, with NAME.lora_A [r, in] and NAME.lora_B [out, r] for some of the
    model's matrices, which become W + scale * B A; W is the checkpoint's, as all the rest.
    """
    update = _weights(request).from_adapters(request.stream(), scale, version, pause)
    return Updated(version=version, seconds=await _to_its_end(update))


@router.post("/v1/weights/disk")
@_admin
async def update_from_disk(request: Request, body: FromDisk) -> Updated:
    """A folder that this server can read."""
    update = _weights(request).from_disk(body.folder, body.version, body.pause)
    return Updated(version=body.version, seconds=await _to_its_end(update))


@router.post(
    "/v1/weights/distributed",
    response_class=StreamingResponse,
    responses={200: {"content": {NDJSON: {}}}},
)
@_admin
async def update_from_broadcast(request: Request, body: FromBroadcast) -> StreamingResponse:
    """Answers line by line: {"do": "join"} where the group is new, as the server joins it;
    {"do": "receive"} as it waits for the first broadcast; then what the other ways answer, or
    {"error": ...}.
    """
    lines: asyncio.Queue[Json | WeightsRefused | None] = asyncio.Queue()
    weights = _weights(request)
    buckets = [[(named.name, named) for named in bucket] for bucket in body.buckets]

    async def update() -> None:
        try:
            seconds = await weights.from_broadcast(
                buckets,
                body.group,
                body.version,
                body.pause,
                lambda what: lines.put_nowait({"do": what}),
            )
            lines.put_nowait({"version": body.version, "seconds": seconds})
        except WeightsRefused as refused:
            lines.put_nowait(refused)
        finally:
            lines.put_nowait(None)

    _start(update())
    first = await lines.get()
    if isinstance(first, WeightsRefused):  # before anything was done
        raise first
    return StreamingResponse(_ndjson(first, lines), media_type=NDJSON)


async def _ndjson(
    line: Json | WeightsRefused | None, more: asyncio.Queue[Json | WeightsRefused | None]
) -> AsyncIterator[bytes]:
    while line is not None:
        if isinstance(line, WeightsRefused):
            line = openai_error(str(line), line.field, "server_error", line.status)
        yield orjson.dumps(line) + b"\n"
        line = await more.get()


async def _to_its_end(update: Coroutine[Any, Any, Seconds]) -> Seconds:
    """Whether or not the client waits for it."""
    return await asyncio.shield(_start(update))


def _start(update: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    task = asyncio.create_task(update)
    _running.add(task)  # or it might be collected
    task.add_done_callback(_running.discard)
    return task


def _weights(request: Request) -> Weights:
    weights = served_weights()
    if weights is None:
        raise WeightsRefused("the server is starting", status=503)
    if not getattr(request.app, "is_single_tokenizer_mode", False):
        message = "with --tokenizer-worker-num above 1, use SGLang's /update_weights_from_disk"
        raise WeightsRefused(message)
    return weights
