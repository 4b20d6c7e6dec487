"""Any dataset of reasoning-gym as a task."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import Field, field_validator, model_validator

from trainer_bridge.errors import BadConfig
from trainer_bridge.tasks.task import Chat, Messages, Split, plain, split_of, stable_hash

_BLOCK = 500  # problems of one seed; some datasets make all of their size at once
# Draws in a row without a new held-out question after which there is taken to be none: about 300
# of them fall into the split, which miss one question in 50 once in 400 times.
_NOTHING_NEW, _MOST_DRAWS = 300, 20_000
_LEAST_DRAWS = 1000  # for a training problem; more where nearly all questions are for evaluation
# Of arithmetic and algebra, the numbers and the operators are the question.
_TERMS = re.compile(r"\w*\d\w*(?:\.\d+)?|[-+*/^%<>&|~]")
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
        """See Task. No question is asked twice in evaluation, where there may be a last one: the
        first that a fixed number of draws did not find. In arithmetic, the same numbers and
        operators in any order and wording are one question.

        Every training problem has its own seeds, tried until a question falls into the split.
        """
        if index < 0:
            raise IndexError(index)
        entry = self._held_out(index) if split == "eval" else self._drawn(index)
        return GymProblem(self.ask(entry["question"]), entry)

    def _drawn(self, index: int) -> dict[str, Any]:
        block, offset = divmod(index, _BLOCK)
        draws = max(_LEAST_DRAWS, math.ceil(30 / (1 - self.eval_share)))  # e^-30 miss by chance
        for attempt in range(min(_MOST_DRAWS, draws)):
            seed = stable_hash("problem", self.seed, "train", block, attempt) % 2**31
            with _seeded_globals(seed):
                entry: dict[str, Any] = self._data(seed)[offset]
            if self._split(entry) == "train":
                return entry
        raise self._too_few("training")

    def _held_out(self, index: int) -> dict[str, Any]:
        examples = frozenset(self._key(question) for question, _ in self.examples)
        found = _held_out_of(self.dataset, self._settings, self.eval_share, examples)
        if not found.has(0):
            raise self._too_few("evaluation")
        return found[index]

    def _too_few(self, what: str) -> BadConfig:
        return BadConfig(
            f"task.parameters.eval_share {self.eval_share:g}: {self.name} has too few different "
            f"questions for {what}"
        )

    def _split(self, entry: dict[str, Any]) -> Split:
        """Questions of worked examples are none for evaluation."""
        key = self._key(entry["question"])
        given = any(key == self._key(question) for question, _ in self.examples)
        return "train" if given else split_of(key, self.eval_share)

    def _key(self, question: str) -> str:
        return _key(self.dataset, question)

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

    @property
    def _settings(self) -> str:
        return json.dumps(self.settings, sort_keys=True)

    def _data(self, seed: int) -> Any:
        return _dataset(self.dataset, self._settings, seed)


class _HeldOut:
    """The evaluation questions of a dataset, found one after the other and kept.

    In the same order whoever asks: they depend on nothing but what is given here.
    """

    def __init__(self, name: str, settings: str, eval_share: float, given: frozenset[str]) -> None:
        self._found: list[dict[str, Any]] = []
        self._new = _new_questions(name, settings, eval_share, given)
        self._lock = threading.Lock()

    def has(self, index: int) -> bool:
        with self._lock:
            while len(self._found) <= index:
                entry = next(self._new, None)
                if entry is None:
                    return False
                self._found.append(entry)
        return True

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self.has(index):
            raise IndexError(index)
        return self._found[index]


@lru_cache(maxsize=16)
def _held_out_of(name: str, settings: str, eval_share: float, given: frozenset[str]) -> _HeldOut:
    return _HeldOut(name, settings, eval_share, given)


def _new_questions(
    name: str, settings: str, eval_share: float, given: frozenset[str]
) -> Iterator[dict[str, Any]]:
    """Entries whose question is of the split and was not there before."""
    seen, fruitless = set(given), 0
    patience = min(_MOST_DRAWS, math.ceil(_NOTHING_NEW / eval_share))
    for block in itertools.count():
        seed = stable_hash("held out", block) % 2**31
        for offset in range(_BLOCK):
            with _seeded_globals(stable_hash("held out", block, offset)):
                entry = _dataset(name, settings, seed)[offset]
            key = _key(name, entry["question"])
            fruitless += 1
            if key not in seen and split_of(key, eval_share) == "eval":
                seen.add(key)
                fruitless = 0
                yield entry
            elif fruitless >= patience:
                return


def _key(dataset: str, question: str) -> str:
    """What is equal of questions that are one."""
    if _is_arithmetic(dataset):
        return " ".join(sorted(_TERMS.findall(question)))
    return plain(question)


@lru_cache
def _is_arithmetic(dataset: str) -> bool:
    from reasoning_gym.factory import DATASETS

    module = DATASETS[dataset][0].__module__
    return module.startswith(("reasoning_gym.arithmetic.", "reasoning_gym.algebra."))


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
