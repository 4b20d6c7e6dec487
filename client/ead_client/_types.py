"""Typed answers. Arrays are one-dimensional, one entry per generated token (T)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ead_client import _html

if TYPE_CHECKING:
    import torch


Json = dict[str, Any]
Preset = Literal["recipe", "paper"]


class AnnealingDict(TypedDict, total=False):
    """The `annealing` object of a request. The server checks it and reports what it applied."""

    schedule: str  # "ead" and the others of /v1/annealing/schema
    preset: Preset | None
    length: float  # tokens of a usual answer, in place of preset and decay numbers
    tau_max: float
    tau_min: float
    decay: float  # tokens
    decay_growth: float  # tokens per training step
    decay_cap: float  # tokens
    warmup: int  # tokens at temperature 1
    step: int | None
    position_offset: int  # tokens


class NotGiven:
    """The type of `NOT_GIVEN`: an argument that was left out, where None says something."""

    def __repr__(self) -> str:
        return "NOT_GIVEN"


NOT_GIVEN: Final = NotGiven()


def _floats(values: Any) -> Any:
    return np.asarray(values, dtype=np.float32)


def _ints(values: Any) -> Any:
    return np.asarray(values, dtype=np.int64)


Floats = Annotated[NDArray[np.float32], BeforeValidator(_floats)]
Ints = Annotated[NDArray[np.int64], BeforeValidator(_ints)]


class ServerModel(BaseModel):
    """What a server sends: keys that are unknown here are of a newer one."""

    model_config = ConfigDict(arbitrary_types_allowed=True, frozen=True, extra="ignore")


class Rollout(ServerModel):
    """What a trainer needs to know of one answer. All arrays have the same length T."""

    token_ids: Ints  # as sampled
    temperatures: Floats  # tau_t that divided the logits
    logprobs: Floats  # log mu_t: under the distribution really sampled from
    model_logprobs: Floats  # log pi: the model's own, at temperature 1
    entropies: Floats | None = None  # of pi, nats; with rollout={"entropies": True}
    prompt_token_ids: Ints | None = None
    annealing: dict[str, Any] | None = None  # the schedule as applied, with its step
    sampling: dict[str, float | None] | None = None  # top_p, top_k, min_p, seed in effect
    finish_reason: str | None = None
    weight_version: str | None = None
    weight_versions: list[dict[str, Any]] | None = None  # by range of tokens

    @model_validator(mode="after")
    def _equally_long(self) -> Rollout:
        columns = (self.temperatures, self.logprobs, self.model_logprobs, self.entropies)
        lengths = {len(column) for column in columns if column is not None}
        if lengths != {len(self.token_ids)}:
            raise ValueError(f"{len(self.token_ids)} tokens with columns of lengths {lengths}")
        return self

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def versions(self) -> list[str]:
        """Of the weights that its tokens were sampled from, oldest first."""
        spans = [str(span["version"]) for span in self.weight_versions or ()]
        return spans or [str(self.weight_version)]

    def to_torch(self) -> dict[str, torch.Tensor]:
        """The columns by name, each [T], int64 and float32, on the CPU; those that are there.

        Columns of the binary form are copied, since bytes cannot be written to. Raises
        ImportError where torch is not installed.
        """
        import torch

        names = ("token_ids", "temperatures", "logprobs", "model_logprobs", "entropies")
        columns = {name: getattr(self, name) for name in (*names, "prompt_token_ids")}
        return {
            name: torch.from_numpy(column if column.flags.writeable else column.copy())
            for name, column in columns.items()
            if column is not None
        }

    def __repr__(self) -> str:
        return f"Rollout({', '.join(f'{name}={value}' for name, value in self._summary())})"

    def __rich_repr__(self) -> Iterator[tuple[str, Any]]:
        yield from self._summary()

    def _repr_html_(self) -> str:
        return _html.rollout_html(self)

    def _summary(self) -> Iterator[tuple[str, Any]]:
        """What is worth a line, by name."""
        yield "tokens", len(self)
        if len(self):
            yield "temperatures", f"{self.temperatures.max():.3g} to {self.temperatures.min():.3g}"
            yield "logprob", f"{self.logprobs.mean():.3g}"
            yield "model_logprob", f"{self.model_logprobs.mean():.3g}"
        yield "finish_reason", self.finish_reason


class Choice(ServerModel):
    """One generated answer."""

    index: int
    text: str  # without the thinking
    reasoning: str = ""  # the thinking, where the server sets it apart (--reasoning-parser)
    finish_reason: str | None = None
    rollout: Rollout | None = None
    tokens: list[str] | None = None  # texts of the tokens, where `logprobs` was asked for
    error: dict[str, Any] | None = None  # of this answer alone, in /v1/rollouts

    @model_validator(mode="before")
    @classmethod
    def _from_openai(cls, raw: Any) -> Any:
        """Chat answers carry the text in a message, or, streamed, in a delta."""
        message = raw.get("message") or raw.get("delta")
        if isinstance(message, dict):
            thought = message.get("reasoning_content") or message.get("reasoning") or ""
            raw = {**raw, "text": message.get("content") or "", "reasoning": thought}
        logprobs = raw.get("logprobs") or {}
        if logprobs.get("content"):
            return {**raw, "tokens": [entry["token"] for entry in logprobs["content"]]}
        return {**raw, "tokens": logprobs["tokens"]} if logprobs.get("tokens") else raw

    def _repr_html_(self) -> str:
        return _html.answers_html([self])


class Completion(ServerModel):
    """All choices of one call, in the order of their index: prompt by prompt, n of each."""

    id: str
    model: str
    choices: list[Choice]
    usage: dict[str, Any] | None = None

    def _repr_html_(self) -> str:
        return _html.answers_html(self.choices)


class Chunk(Completion):
    """One piece of a streamed answer: new text, and the columns of the new tokens."""

    choices: list[Choice] = Field(default_factory=list)
