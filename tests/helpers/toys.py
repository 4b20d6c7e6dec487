"""Tasks that a randomly initialised model can learn, or that fail in a way of interest."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Question:
    index: int
    text: str

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        return ({"role": "user", "content": self.text},)


class Letters:
    """The reward is the share of an answer's characters that are an e."""

    name = "letters"

    def problem(self, index: int, split: str = "train") -> Question:
        return Question(index, f"{split} {index}")

    def reward(self, problem: Question, answer: str) -> float:
        return answer.lower().count("e") / max(1, len(answer))


class NeverScored(Letters):
    """The reward function does not return. It makes the file that BEING_SCORED names."""

    def reward(self, problem: Question, answer: str) -> float:
        Path(os.environ["BEING_SCORED"]).touch()
        while True:
            signal.pause()


class EverySecondTooLong(Letters):
    """Questions with odd indices do not fit the model's context."""

    def problem(self, index: int, split: str = "train") -> Question:
        return Question(index, "long " * 5000 * (index % 2) + str(index))


class AllTooLong(Letters):
    def problem(self, index: int, split: str = "train") -> Question:
        return Question(index, "long " * 5000)


class EverySecondTeachesNothing(Letters):
    """All answers to questions with even indices are worth the same."""

    def reward(self, problem: Question, answer: str) -> float:
        return super().reward(problem, answer) + len(answer) if problem.index % 2 else 0.5


class SometimesRaises(Letters):
    """The reward function fails for answers with an even number of characters."""

    def reward(self, problem: Question, answer: str) -> float:
        if len(answer) % 2 == 0:
            raise ZeroDivisionError("an even answer")
        return super().reward(problem, answer)
