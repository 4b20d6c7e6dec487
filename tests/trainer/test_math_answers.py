"""The math reward, against a table of answers with the value that a careful mathematician gives.

`math_answers.jsonl` has a reference per line, with answers that are right, wrong, or undecidable
from their text alone: what stands in \\boxed{} ("given": "boxed"), or the whole answer ("whole").
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer_bridge.tasks.math import MathFile, MathProblem
from trainer_bridge.tasks.math_equal import equal
from trainer_bridge.tasks.math_final import final_answer
from trainer_bridge.tasks.math_text import number

LINES = (Path(__file__).parent / "math_answers.jsonl").read_text(encoding="utf-8").splitlines()
TABLE: list[dict[str, Any]] = [json.loads(line) for line in LINES]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> MathFile:
    path = tmp_path_factory.mktemp("math") / "sums.jsonl"
    rows = [{"problem": f"{i} + {i}?", "answer": 2 * i} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return MathFile(path=path)


@pytest.mark.parametrize(
    "row", TABLE, ids=[f"{number}: {row['reference']}" for number, row in enumerate(TABLE, 1)]
)
def test_the_reward_is_what_a_careful_mathematician_gives(
    task: MathFile, row: dict[str, Any]
) -> None:
    """1 for what is right; 0 for what is wrong, and for what nobody can decide."""
    problem = MathProblem((), row["reference"])
    wrong = []
    for value in ("right", "wrong", "undecidable"):
        for given in row.get(value, []):
            whole = given if row["given"] == "whole" else f"So the answer is $\\boxed{{{given}}}$."
            if task.reward(problem, whole) != float(value == "right"):
                wrong.append((value, given))
    assert not wrong


def test_the_table_is_large_and_has_both_values() -> None:
    counts = {value: sum(len(row.get(value, [])) for row in TABLE) for value in ("right", "wrong")}
    assert min(counts.values()) >= 300


@pytest.mark.parametrize(
    "long",
    [
        lambda n: "\\boxed{" * n,
        lambda n: "\\boxed{1} and " * n,
        lambda n: "\\boxed{1}\\boxed{2} " * n,
        lambda n: "{" * n + "}" * n + "\\boxed{1}",
        lambda n: "<think>" * n + "</think>" * n + "\\boxed{1}",
        lambda n: "<answer>" * n,
        lambda n: "the answer is " * n,
        lambda n: "42 " * n,
        lambda n: "$" * n + "\\[" * n,
        lambda n: "\\boxed{" + "4" * n + "}",
        lambda n: "\\boxed{" + "{" * n + "}" * n + "}",
        lambda n: "\\boxed" + " " * n,
        lambda n: "-" * n,
        lambda n: "a" + "\n" * n + "b" + " " * n,
    ],
)
def test_the_work_grows_as_the_answer_does(long: Callable[[int], str], task: MathFile) -> None:
    """Counted in Python's own calls and lines, not in seconds: 8 times as long, at most 12 times
    the work. (What C code does within one line is covered by its end within the test's time.)"""
    problem = MathProblem((), "41.5")

    def work(answer: str) -> int:
        count = 0

        def trace(*_: object) -> Any:
            nonlocal count
            count += 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            assert task.reward(problem, answer) == 0.0
        finally:
            sys.settrace(before)
        return count

    work(long(1))  # what is done once: compiling expressions
    assert work(long(1600)) <= 12 * work(long(200)) + 1000
    assert task.reward(problem, long(100_000)) == 0.0


def test_numbers_are_exact() -> None:
    assert number("0.1") == 1 / number("10")  # type: ignore[operator]
    assert number("1e9999999999") is None
    assert number(r"\frac{1}{0}") is None
    assert not equal("0.3333333333333333", r"\frac13")
    for nested in ("(1," * 300, "5" + "%" * 900, "-" * 900 + "5", "[" * 400 + "5" + "]" * 400):
        assert not equal("5", nested)


def test_an_answer_without_an_end_is_none() -> None:
    for text in ("", "<think>42", r"\boxed{", r"\boxed{}", r"\boxed{1} \boxed{", "Is it 42?"):
        assert final_answer(text) is None
    assert final_answer(r"\boxed{1}, \boxed{2}") == "1, 2"


def test_votes_are_whole_numbers_and_fractions(task: MathFile) -> None:
    """Of two halves of a fraction, the lower one is no vote."""
    votes = [task.final_answer(f"The answer is {text}") for text in ("1/2", "3/2", "-1/2", "5 / 2")]
    assert votes == ["1/2", "3/2", "-1/2", "5/2"]
    assert task.final_answer(r"\fbox{42}") == task.final_answer(r"\boxed{42}") == "42"
    assert task.final_answer("<think>41") is None
