"""How rollouts are written: JSON, safetensors, and streams of either, group by group. After 30 s
without data a stream sends a space (NDJSON) or an empty frame, as a sign of life.

Safetensors because any language reads it, it holds numbers only, and a reader can look at its
arrays where they lie. The arrays of all answers are put end to end:

    token_ids          uint16 [T]           all answers, group by group; or, where 16 bits are too
    token_ids_low      uint16 [T]           few for one of them, the lowest 16 of each
    token_ids_high     uint8 [T]            and the highest 8: low + 65536 * high
    offsets            int64 [A + 1]        answer i is offsets[i]:offsets[i + 1] of a column
    logprobs, model_logprobs, entropies (on request)     float32 [T]
    temperatures       float32 [U]          each run of values once: most schedules are the same
    temperature_starts int64 [A]            for all answers; answer i's begin here
    prompt_token_ids   int32 [P]
    prompt_offsets     int64 [G + 1]
    json               uint8                UTF-8 of everything that is no number, in the order of
                                            groups and answers
"""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from safetensors.numpy import save

from ead_sampler.names import ANNEALING, COLUMNS, ENTROPIES, SAMPLING
from ead_server.json_types import Json
from ead_server.rollouts.job import Group, Job

# of 9: JSON to two fifths; the others take many times as long to save a tenth of that
GZIP_LEVEL = 1

_ARRAYS = ("token_ids", *COLUMNS, ENTROPIES)
_OF_GROUP = (ANNEALING, SAMPLING)  # the same for all its answers


def json_group(group: Group) -> bytes:
    """A group with its columns as lists (orjson writes arrays as such).

    One answer at a time: orjson keeps Python's lock, which others wait for, until it is done.
    """
    answers = (
        dumps({"index": index, **_without(_OF_GROUP, answer)})
        for index, answer in enumerate(group.answers)
    )
    head = {**_head(group), "prompt_token_ids": group.prompt_token_ids}
    return _with_list(head, "answers", answers)


def _with_list(head: Json, name: str, items: Iterable[bytes]) -> bytes:
    """The JSON object `head`, with a last field `name`: a list of what is JSON already."""
    return b'%b,"%b":[%b]}' % (dumps(head)[:-1], name.encode(), b",".join(items))


def _head(group: Group) -> Json:
    """What is said of a group, the schedule and the cuts of its answers included.

    A seed is the first answer's; those of the others count up from it.
    """
    sampled = next((a for a in group.answers if a["error"] is None), {})
    if (sampled.get(SAMPLING) or {}).get("seed") is not None:
        seed = group.params["sampling_seed"]
        sampled = {**sampled, SAMPLING: {**sampled[SAMPLING], "seed": seed}}
    return {
        "object": "rollouts.group",
        "index": group.index,
        "metadata": group.prompt.metadata,
        "error": group.error,
        **{name: sampled.get(name) for name in _OF_GROUP},
    }


def _without(names: Sequence[str], answer: Json) -> Json:
    return {name: value for name, value in answer.items() if name not in names}


def dumps(content: Any) -> bytes:
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def json_answer(job: Job) -> bytes:
    head = {**job.about(), "object": "rollouts", "usage": job.usage()}
    return _with_list(head, "groups", map(json_group, job.groups))


def json_line(group: Group) -> bytes:
    return json_group(group) + b"\n"


QUIET_LINE = b" "  # becomes a leading space of the next line, which JSON parsers ignore


def last_json_line(job: Job) -> bytes:
    return dumps({**job.about(), "object": "rollouts.end", "usage": job.usage()}) + b"\n"


def binary_answer(job: Job) -> bytes:
    return pack(job.groups, {**job.about(), "object": "rollouts", "usage": job.usage()})


def frame(group: Group) -> bytes:
    packed = pack([group], {"object": "rollouts.group"})
    return len(packed).to_bytes(8, "little") + packed


def quiet_frame() -> bytes:
    """A frame of no group, whose reader sees that the stream goes on."""
    packed = pack([], {"object": "rollouts.quiet"})
    return len(packed).to_bytes(8, "little") + packed


def last_frame(job: Job) -> bytes:
    packed = pack([], {**job.about(), "object": "rollouts.end", "usage": job.usage()})
    return len(packed).to_bytes(8, "little") + packed


def pack(groups: Sequence[Group], head: Json) -> bytes:
    """Groups as one safetensors file, see the module's docstring."""
    answers = [answer for group in groups for answer in group.answers]
    lengths = [0 if a["error"] is not None else len(a["token_ids"]) for a in answers]
    sampled = [answer for answer in answers if answer["error"] is None]
    temperatures, starts = _shared_runs(
        [a["temperatures"] if a["error"] is None else np.empty(0, np.float32) for a in answers]
    )
    arrays = {
        **_token_ids(_concat([answer["token_ids"] for answer in sampled], np.int32)),
        "offsets": _offsets(lengths),
        "temperatures": temperatures,
        "temperature_starts": starts,
        "prompt_token_ids": _concat([group.prompt_token_ids for group in groups], np.int32),
        "prompt_offsets": _offsets([len(group.prompt_token_ids) for group in groups]),
    }
    columns = [name for name in (*COLUMNS[1:], ENTROPIES) if all(name in a for a in sampled)]
    for name in columns if sampled else COLUMNS[1:]:
        arrays[name] = _concat([answer[name] for answer in sampled], np.float32)
    told = (*_ARRAYS, *_OF_GROUP)
    about_groups = [
        {**_head(group), "answers": [_without(told, answer) for answer in group.answers]}
        for group in groups
    ]
    text = orjson.dumps({**head, "groups": about_groups})
    arrays["json"] = np.frombuffer(text, np.uint8)
    return save(arrays)


def _concat(parts: list[NDArray[Any]], kind: Any) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, kind)


def _token_ids(token_ids: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
    """As one array, or as two with names of their own: nobody must take the low bits for ids."""
    low = token_ids.astype(np.uint16)
    if not token_ids.max(initial=0) >> 16:
        return {"token_ids": low}
    return {"token_ids_low": low, "token_ids_high": (token_ids >> 16).astype(np.uint8)}


def _offsets(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _shared_runs(
    columns: Sequence[NDArray[np.float32]],
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The columns end to end, without those that another one begins with, and where each begins.

    Compared bit by bit, never derived: what is written is what was recorded.
    """
    starts = np.zeros(len(columns), np.int64)
    runs: list[tuple[int, NDArray[np.float32]]] = []
    total = 0
    for index in sorted(range(len(columns)), key=lambda i: -len(columns[i])):
        column = columns[index]
        for start, run in reversed(runs[-4:]):
            if np.array_equal(run[: len(column)].view(np.uint32), column.view(np.uint32)):
                starts[index] = start
                break
        else:
            starts[index] = total
            runs.append((total, column))
            total += len(column)
    return _concat([run for _, run in runs], np.float32), starts


# --- compressed, where the client asks ---------------------------------------------------------


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether the client names gzip, and not with a weight of 0."""
    for part in accept_encoding.lower().split(","):
        name, _, weight = part.replace(" ", "").partition(";q=")
        if name == "gzip":
            return not weight or bool(weight.strip("0."))
    return False


async def compressed(content: bytes) -> bytes:
    """In another thread, which does not hold up the others: zlib lets go of the interpreter."""
    return await asyncio.to_thread(gzip.compress, content, GZIP_LEVEL)


async def compressed_parts(parts: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    """One compressed body, of which each part can be read when it arrives."""
    compressor = zlib.compressobj(GZIP_LEVEL, wbits=16 + zlib.MAX_WBITS)  # 16: as gzip

    def compress(part: bytes) -> bytes:
        return compressor.compress(part) + compressor.flush(zlib.Z_SYNC_FLUSH)

    async with aclosing(parts):
        async for part in parts:
            yield await asyncio.to_thread(compress, part)
    yield compressor.flush()
