"""The built-in task: problems from reasoning-gym that a 135M model sometimes solves.

`letter_counting` with two worked examples. SmolLM2-135M-Instruct at temperature 1 solved 32% of
24 problems x 4 answers, and 88% of the groups of four had both right and wrong answers; answers
are 4 tokens long on average. Sums, products, sorting and reversing stayed below 22%.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_SYSTEM = "Answer with the number only."
_EXAMPLES = (
    ('How many times does the letter "o" appear in the text: "good to go"?', "4"),
    ('How many times does the letter "a" appear in the text: "a red car"?', "2"),
)


@dataclass(frozen=True)
class LetterCountingProblem:
    """A question as a chat, and reasoning-gym's own entry, which its verifier wants."""

    messages: tuple[dict[str, str], ...]
    entry: dict[str, Any]


class LetterCounting:
    """Counting a letter in a few words, checked by reasoning-gym's exact verifier."""

    def __init__(self, *, min_words: int = 2, max_words: int = 4) -> None:
        self._words = {"min_words": min_words, "max_words": max_words}

    def problems(self, count: int, seed: int) -> list[LetterCountingProblem]:
        """`count` problems; the same for the same seed."""
        data = self._dataset(count, seed)
        return [LetterCountingProblem(_chat(entry["question"]), entry) for entry in data]

    def reward(self, problem: LetterCountingProblem, answer: str) -> float:
        """1.0 when the last whole number of `answer` is right, else 0.0: no partial credit."""
        numbers = re.findall(r"\d+", answer)
        if not numbers:
            return 0.0
        score = self._dataset(1, 0).score_answer(numbers[-1], problem.entry)
        return 1.0 if score == 1.0 else 0.0

    def _dataset(self, size: int, seed: int) -> Any:
        import reasoning_gym

        return reasoning_gym.create_dataset("letter_counting", size=size, seed=seed, **self._words)


def _chat(question: str) -> tuple[dict[str, str], ...]:
    messages = [{"role": "system", "content": _SYSTEM}]
    for asked, answered in _EXAMPLES:
        messages += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answered},
        ]
    return (*messages, {"role": "user", "content": question})
