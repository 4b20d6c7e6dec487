"""The route of rollouts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from ead_server import metrics
from ead_server.asgi import off_loop
from ead_server.error_route import OpenAIErrorsRoute
from ead_server.errors import BadField
from ead_server.media_types import FORMATS, FRAMES, JSON, NDJSON
from ead_server.rollouts import packing
from ead_server.rollouts.engine import Engine
from ead_server.rollouts.job import Group, Job, plan
from ead_server.rollouts.kept_jobs import KeptJobs
from ead_server.rollouts.request import parse

router = APIRouter(route_class=OpenAIErrorsRoute, tags=["annealing"])
_kept = KeptJobs()


@router.post("/v1/rollouts")  # described in openapi.py
async def create_rollouts(request: Request) -> Response:
    """n answers to each of many prompts, with everything that a trainer needs of each token.

    `Accept` chooses the form: `application/json`, `application/vnd.safetensors`, or group by group
    as they complete, `application/x-ndjson` or `application/vnd.safetensors-seq`;
    `Accept-Encoding: gzip` compresses any of them. One prompt's failure is that group's `error`.
    Without an `Idempotency-Key` header, closing the connection stops the generation at once; with
    one it goes on, and the same request finds it again.
    """
    body = await request.body()
    parsed = await off_loop(len(body), parse, body)
    form = _accepted(request.headers.get("accept", ""))
    key = _idempotency_key(request)
    job = _kept.find(key, body) if key else None
    if job is None:
        engine = Engine(request.app)
        job = Job(plan(parsed), engine, engine.manager.served_model_name)
        if key:
            _kept.keep(key, body, job)
    started = time.perf_counter()
    headers = {"vary": "accept, accept-encoding"}
    compress = packing.accepts_gzip(request.headers.get("accept-encoding", ""))
    if compress:
        headers["content-encoding"] = "gzip"
    if form in (NDJSON, FRAMES):
        parts = _streamed(job, form, started, keep=key is not None)
        body_parts = packing.compressed_parts(parts) if compress else parts
        return StreamingResponse(body_parts, media_type=form, headers=headers)
    await _finished_or_gone(job, request, keep=key is not None)
    write = packing.json_answer if form == JSON else packing.binary_answer
    content = await off_loop(_size(*job.groups), write, job)
    metrics.count_rollouts(FORMATS[form], len(content), time.perf_counter() - started)
    if compress:
        content = await packing.compressed(content)
    return Response(content, media_type=form, headers=headers)


async def _streamed(
    job: Job, form: str, started: float, *, keep: bool
) -> AsyncGenerator[bytes, None]:
    one, last, quiet = (
        (packing.json_line, packing.last_json_line, packing.QUIET_LINE)
        if form == NDJSON
        else (packing.frame, packing.last_frame, packing.quiet_frame())
    )
    size = 0
    try:
        async for group in job.as_completed():
            if group is None:
                yield quiet
                continue
            part = await off_loop(_size(group), one, group)
            size += len(part)
            yield part
        yield last(job)
        metrics.count_rollouts(FORMATS[form], size, time.perf_counter() - started)
    finally:
        if not keep:
            job.cancel()


async def _finished_or_gone(job: Job, request: Request, *, keep: bool) -> None:
    """Return when the job is done, or the client gone; then it is cancelled unless kept."""
    gone = asyncio.create_task(_until_gone(request))
    finished = asyncio.create_task(job.wait())
    try:
        await asyncio.wait((gone, finished), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not job.done and not keep:
            job.cancel()
            finished.cancel()
    if finished.done():
        finished.result()


def _size(*groups: Group) -> int:
    """About as many bytes as these groups have in JSON."""
    answers = (answer for group in groups for answer in group.answers)
    return sum(50 * len(answer.get("token_ids", ())) for answer in answers)


def _accepted(accept: str) -> str:
    """The first of our forms that the client names; JSON for anything else."""
    named = [part.partition(";")[0].strip() for part in accept.split(",")]
    return next((kind for kind in named if kind in FORMATS), JSON)


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 1 <= len(key) <= 200:
        raise BadField("Idempotency-Key", "must have 1 to 200 characters")
    if not getattr(request.app, "is_single_tokenizer_mode", False):
        raise BadField(
            "Idempotency-Key", "a retry may reach another process (--tokenizer-worker-num)"
        )
    return key


async def _until_gone(request: Request) -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
