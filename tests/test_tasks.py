"""The built-in task: deterministic problems, and an exact verifier checked by counting."""

from __future__ import annotations

import re

import pytest

from trainer_bridge.tasks import LetterCounting, LetterCountingProblem


@pytest.fixture(scope="module")
def problems() -> list[LetterCountingProblem]:
    return LetterCounting().problems(20, seed=3)


def count_by_hand(problem: LetterCountingProblem) -> int:
    question = problem.messages[-1]["content"]
    found = re.fullmatch(
        r'How many times does the letter "(.)" appear in the text: "(.*)"\?', question, re.DOTALL
    )
    assert found is not None, question
    letter, text = found.groups()
    return text.lower().count(letter.lower())


def test_only_the_right_count_is_rewarded(problems: list[LetterCountingProblem]) -> None:
    task = LetterCounting()
    for problem in problems:
        right = count_by_hand(problem)
        assert task.reward(problem, str(right)) == 1.0
        assert task.reward(problem, f"It is {right + 5}, no: {right}.") == 1.0
        for wrong in (str(right + 1), f"{right} or {right + 2}", f"{right}0", "", "none", "two"):
            assert task.reward(problem, wrong) == 0.0


def test_problems_depend_on_the_seed_alone(problems: list[LetterCountingProblem]) -> None:
    assert LetterCounting().problems(20, seed=3) == problems
    other = LetterCounting().problems(20, seed=4)
    assert [p.messages for p in other] != [p.messages for p in problems]
