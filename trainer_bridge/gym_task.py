"""Any dataset of reasoning-gym as a task."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import Field, field_validator, model_validator

from trainer_bridge.tasks import Chat, Messages, Split, split_of, stable_hash

_BLOCK = 500  # problems of one seed; some datasets make all of their size at once
_TRIES = 1000
# Of reasoning-gym 0.1.25: what they make differs with the seed of Python's hashes.
_DEPENDS_ON_HASH_SEED = frozenset(
    {
        "codeio",
        "intermediate_integration",
        "isomorphic_strings",
        "knight_swap",
        "polynomial_multiplication",
        "ransom_note",
        "word_ladder",
    }
)


@dataclass(frozen=True)
class GymProblem:
    """A question as a chat, and reasoning-gym's own entry, which its scorer wants."""

    messages: Messages
    entry: dict[str, Any]


class ReasoningGym(Chat):
    """A dataset of reasoning-gym: endless problems with exact scorers."""

    dataset: str = Field(description="its name in reasoning-gym, such as products")
    settings: dict[str, Any] = Field(
        default={}, description="the dataset's own, such as min_words; not size and seed"
    )
    answer_pattern: str | None = Field(
        default=None,
        description="regular expression: the last match in an answer (its group, if it has one) is "
        "what is scored, and no match is wrong; None: the whole answer",
    )
    partial_credit: bool = Field(
        default=False, description="the dataset's scores as they are, not only 1 for right, else 0"
    )

    @property
    def name(self) -> str:
        return f"reasoning-gym/{self.dataset}"

    @field_validator("answer_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            groups = re.compile(pattern or "").groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        if groups > 1:
            raise ValueError("at most one group, of what is scored; (?:...) are free")
        return pattern

    @model_validator(mode="after")
    def _exists(self) -> ReasoningGym:
        if {"size", "seed"} & self.settings.keys():
            raise ValueError("settings: size and seed are not the dataset's own here")
        if self.dataset in _DEPENDS_ON_HASH_SEED and os.environ.get("PYTHONHASHSEED") != "0":
            raise ValueError(
                f"{self.dataset} makes other problems in every Python process; start this one with "
                "PYTHONHASHSEED=0"
            )
        try:
            self._data(0)
        except Exception as error:  # asserts, unknown names, unknown settings
            raise ValueError(f"reasoning-gym refuses {self.dataset}: {error}") from error
        return self

    def problem(self, index: int, split: Split = "train") -> GymProblem:
        """See Task. Every index has its own seeds, tried until a question falls into the split."""
        if index < 0:
            raise IndexError(index)
        block, offset = divmod(index, _BLOCK)
        for attempt in range(_TRIES):
            seed = stable_hash("problem", self.seed, split, block, attempt) % 2**31
            with _seeded_globals(seed):
                entry = self._data(seed)[offset]
            if split_of(entry["question"], self.eval_share) == split:
                return GymProblem(self.ask(entry["question"]), entry)
        raise ValueError(f"{self.name}: too few different questions for a split {split!r}")

    def reward(self, problem: GymProblem, answer: str) -> float:
        """The dataset's score. What its scorer cannot read (ValueError) is wrong."""
        final = self.final_answer(answer)
        if final is None:
            return 0.0
        try:
            score = float(self._data(0).score_answer(final, problem.entry))
        except ValueError:
            return 0.0
        return score if self.partial_credit else float(score == 1.0)

    def final_answer(self, answer: str) -> str | None:
        """The part that is scored, None without one."""
        if self.answer_pattern is None:
            return answer.strip()
        found = re.findall(self.answer_pattern, answer, re.DOTALL)
        return found[-1] if found else None

    def _data(self, seed: int) -> Any:
        return _dataset(self.dataset, json.dumps(self.settings, sort_keys=True), seed)


@lru_cache(maxsize=64)
def _dataset(name: str, settings: str, seed: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=_BLOCK, seed=seed, **json.loads(settings))


@contextmanager
def _seeded_globals(seed: int) -> Iterator[None]:
    """Some datasets draw from Python's global generator, in spite of their seed."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
