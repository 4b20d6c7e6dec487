"""Answers of /v1/rollouts, read from safetensors where the arrays lie.

Only token ids are copied: they travel in 16 or 24 bits, which torch cannot compute with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ead_client import _html
from ead_client._types import Choice, Ints, Json, ServerModel
from ead_client.errors import MalformedAnswer

WHOLE = "application/vnd.safetensors"
FRAMES = "application/vnd.safetensors-seq"
_DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F32": np.dtype("<f4"),
}


class Group(ServerModel):
    """One prompt of a request and its answers."""

    index: int  # of the prompt in the request
    metadata: Any = None  # as it was sent
    error: Json | None = None  # OpenAI's error object, when no answer was begun
    prompt_token_ids: Ints
    answers: list[Choice]  # `rollout` is None where `error` says why
    # the safetensors file that it came in, where it came alone; its arrays are views of it
    packed: bytes | None = Field(default=None, repr=False, exclude=True)

    def _repr_html_(self) -> str:
        return _html.answers_html(self.answers)


class Rollouts(ServerModel):
    """All groups, in the order of their prompts."""

    id: str
    model: str
    groups: list[Group]
    usage: dict[str, int] = Field(default_factory=dict)

    @property
    def errors(self) -> list[Json]:
        """What went wrong, in whole groups and in single answers."""
        whole = [group.error for group in self.groups if group.error]
        single = [a.error for group in self.groups for a in group.answers if a.error]
        return whole + single


def unpack(data: bytes) -> tuple[Json, list[Group]]:
    """One safetensors file: what is said of the whole, and its groups. Raises MalformedAnswer."""
    try:
        arrays = _arrays(data)
        about = json.loads(arrays["json"].tobytes())
        groups = about.pop("groups")
        return about, list(_groups(groups, arrays, data if len(groups) == 1 else None))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise MalformedAnswer(f"not rollouts: {type(error).__name__}: {error}") from error


def _arrays(data: bytes) -> dict[str, NDArray[Any]]:
    """Views into `data`; the format is a length, a JSON header and the numbers."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        dtype = _DTYPES[entry["dtype"]]
        count = (last - first) // dtype.itemsize
        if list(entry["shape"]) != [count]:
            raise ValueError(f"{name} has shape {entry['shape']} in {last - first} bytes")
        arrays[name] = np.frombuffer(data, dtype, count, start + first)
    if "token_ids_high" in arrays:
        high = arrays["token_ids_high"].astype(np.int32)
        arrays["token_ids"] = (high << 16) | arrays["token_ids_low"]
    return arrays


def _groups(
    about: list[Json], arrays: dict[str, NDArray[Any]], packed: bytes | None
) -> Iterator[Group]:
    number = 0  # of the answer, counted over all groups
    for position, group in enumerate(about):
        first, last = arrays["prompt_offsets"][position : position + 2]
        prompt = arrays["prompt_token_ids"][first:last]
        answers = []
        for index, answer in enumerate(group["answers"]):
            rollout = None
            if answer["error"] is None:
                columns = _columns(arrays, number)
                shared = {name: group[name] for name in ("annealing", "sampling")}
                rollout = {**answer, **shared, **columns, "prompt_token_ids": prompt}
            text = answer.get("text") or ""
            reason = answer.get("finish_reason")
            choice = {"index": index, "text": text, "finish_reason": reason, "rollout": rollout}
            answers.append({**choice, "error": answer["error"]})
            number += 1
        fields = {**group, "prompt_token_ids": prompt, "answers": answers, "packed": packed}
        yield Group.model_validate(fields)


def _columns(arrays: dict[str, NDArray[Any]], number: int) -> dict[str, NDArray[Any]]:
    first, last = arrays["offsets"][number : number + 2]
    names = [name for name in ("logprobs", "model_logprobs", "entropies") if name in arrays]
    columns = {name: arrays[name][first:last] for name in ("token_ids", *names)}
    start = arrays["temperature_starts"][number]
    columns["temperatures"] = arrays["temperatures"][start : start + (last - first)]
    return columns


class Frames:
    """Cuts a stream of length-prefixed frames, however its bytes arrive."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that are now whole."""
        self._buffer += data
        while len(self._buffer) >= 8:
            end = 8 + int.from_bytes(self._buffer[:8], "little")
            if len(self._buffer) < end:
                return
            yield bytes(self._buffer[8:end])
            del self._buffer[:end]
