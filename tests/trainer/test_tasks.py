"""Tasks: the same problem for the same number, splits that never meet, and exact scorers."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest

from trainer_bridge.errors import BadConfig
from trainer_bridge.run.evaluate import held_out as held_out_problems
from trainer_bridge.tasks.gym import ReasoningGym
from trainer_bridge.tasks.math import MathFile, MathProblem
from trainer_bridge.tasks.reward_runner import RewardRunner
from trainer_bridge.tasks.rewards import RewardConfig, RewardFailure
from trainer_bridge.tasks.task import Task, TaskConfig

# the last draws from Python's global generator now and then, at these numbers too
DATASETS = ("letter_counting", "chain_sum", "list_functions")
# of evaluation, those before a problem are found first
NUMBERS = {"eval": (0, 2, 7, 22, 26, 38), "train": (0, 7, 499, 500, 12_345)}


def questions(task: Any, indices: Any, split: str) -> list[str]:
    return [task.problem(index, split).messages[-1]["content"] for index in indices]


def held_out(task: Any, most: int = 400) -> list[str]:
    """All questions for evaluation, or the first so many."""
    found: list[str] = []
    with contextlib.suppress(IndexError):
        for index in range(most):
            found += questions(task, [index], "eval")
    return found


# --- reasoning-gym -------------------------------------------------------------------------------


def test_a_problem_depends_on_its_number_alone() -> None:
    """In any order, in any process, whatever the seeds of hashes and of global generators are."""
    code = (
        "import json, random, sys\n"
        "from trainer_bridge.tasks.gym import ReasoningGym\n"
        "random.seed(sys.argv[1])\n"
        "found = {}\n"
        f"for name in {DATASETS}:\n"
        "    task = ReasoningGym(dataset=name)\n"
        f"    for split, numbers in {NUMBERS}.items():\n"
        "        for i in reversed(numbers):\n"
        "            found[f'{name} {split} {i}'] = task.problem(i, split).messages\n"
        "print(json.dumps(found))"
    )
    found = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", code, seed],
                env={**os.environ, "PYTHONHASHSEED": seed},
                capture_output=True,
                check=True,
            ).stdout
        )
        for seed in ("1", "2")
    ]
    here = {
        f"{name} {split} {index}": list(ReasoningGym(dataset=name).problem(index, split).messages)
        for name in DATASETS
        for split, numbers in NUMBERS.items()
        for index in numbers
    }
    assert found == [here, here]


def test_datasets_that_differ_between_processes_are_refused_unless_hashes_are_fixed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ValueError, match="start this one with PYTHONHASHSEED=0"):
        ReasoningGym(dataset="word_ladder")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert ReasoningGym(dataset="word_ladder").name == "reasoning-gym/word_ladder"


def test_no_question_is_in_both_splits_even_where_there_are_few() -> None:
    """Sums of two digits: 100 questions, so that a split by seed would have nearly all in both."""
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    task = ReasoningGym(dataset="chain_sum", settings=settings, eval_share=0.25)
    train, kept = questions(task, range(1000), "train"), held_out(task)
    other = task.model_copy(update={"seed": 1})
    assert not set(train + questions(other, range(1000), "train")) & set(kept)
    assert len(set(kept)) == len(kept)
    assert len(set(train)) > 50
    assert len(set(kept)) > 10
    assert questions(other, range(20), "train") != train[:20]


def numbers_of(question: str) -> tuple[str, ...]:
    """Without their order, and without the words around them."""
    return tuple(sorted(re.findall(r"[\d.]*\d", question)))


@pytest.mark.parametrize(
    ("dataset", "settings", "fewest"),
    [
        ("products", {"max_digits": 1}, 2),  # 55 of them
        ("products", {"max_digits": 1, "max_terms": 3}, 20),
        ("products", {"max_digits": 1, "min_terms": 3, "max_terms": 3}, 15),
        ("products", {"max_digits": 1, "allow_negation": True}, 5),
        ("products", {"max_digits": 2}, 64),
        ("chain_sum", {"min_terms": 3, "max_terms": 3, "max_digits": 1}, 40),
        ("decimal_chain_sum", {"max_terms": 2, "max_digits": 1, "max_decimal_places": 1}, 64),
        ("lcm", {"max_value": 12}, 5),
        ("gcd", {"max_value": 12}, 5),
        ("basic_arithmetic", {"max_digits": 1, "max_terms": 2, "format_style": "natural"}, 10),
        ("simple_equations", {"max_value": 10, "max_terms": 2}, 64),
    ],
)
def test_the_same_numbers_are_asked_once_and_in_one_split(
    dataset: str, settings: dict[str, Any], fewest: int
) -> None:
    """a * b and b * a are one question, as are two wordings of one."""
    task = ReasoningGym(dataset=dataset, settings=settings)
    kept = [numbers_of(question) for question in held_out(task, 64)]
    trained = {
        numbers_of(question)
        for seed in (0, 1)
        for question in questions(task.model_copy(update={"seed": seed}), range(500), "train")
    }
    assert len(kept) >= fewest
    # with several operators or signs, the same numbers may make more than one question
    if dataset in ("products", "lcm", "gcd") and "allow_negation" not in settings:
        assert len(set(kept)) == len(kept)
        assert not trained & set(kept)
    assert len(trained) > 20


def test_the_default_task_evaluates_each_of_its_questions_once_and_trains_on_none() -> None:
    task = TaskConfig().build()
    kept = [numbers_of(question) for question in held_out(task)]
    trained = {numbers_of(question) for question in questions(task, range(2000), "train")}
    assert len(set(kept)) == len(kept) >= 12
    assert not trained & set(kept)
    assert len(trained) + len(kept) == 10 + 45  # of two factors below ten, in any order


def test_what_a_worked_example_answers_is_not_evaluated() -> None:
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    plain = ReasoningGym(dataset="products", settings=settings, eval_share=0.3)
    kept = held_out(plain)
    given = re.findall(r"(\d) \* (\d)", kept[0])[0]
    example = (f"{given[1]} * {given[0]} =", "?")
    told = plain.model_copy(update={"examples": (example,)})
    assert held_out(told) == kept[1:]


def test_datasets_that_make_all_their_problems_at_once_are_as_endless_as_others() -> None:
    task = ReasoningGym(dataset="acre", eval_share=0.5)
    assert len(set(questions(task, [0, 1, 10**9], "train"))) == 3


def test_the_evaluation_share_is_the_share_of_questions() -> None:
    from trainer_bridge.tasks.task import split_of

    drawn = [split_of(f"question {i}", 0.2) for i in range(10_000)]
    # 5 standard deviations of a binomial share: one false alarm in two million
    assert abs(drawn.count("eval") / len(drawn) - 0.2) < 5 * (0.2 * 0.8 / len(drawn)) ** 0.5


def test_a_dataset_without_enough_different_questions_says_so() -> None:
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    task = ReasoningGym(dataset="chain_sum", settings=settings, eval_share=1e-9)
    with pytest.raises(ValueError, match="too few different questions"):
        task.problem(0, "eval")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"dataset": "no_such_dataset"}, "reasoning-gym refuses no_such_dataset"),
        ({"dataset": "chain_sum", "settings": {"min_term": 2}}, "min_term"),
        ({"dataset": "chain_sum", "settings": {"min_terms": -1}}, "min_terms must be positive"),
        ({"dataset": "chain_sum", "settings": {"seed": 1}}, "size and seed"),
        ({"dataset": "chain_sum", "answer_pattern": "("}, "not a regular expression"),
        ({"dataset": "chain_sum", "answer_pattern": "(a)(b)"}, "at most one group"),
        ({"dataset": "chain_sum", "eval_share": 0.0}, "greater than 0"),
        ({"dataset": "chain_sum", "examples": [["only a question"]]}, "examples"),
        ({"dataset": "chain_sum", "difficulty": 3}, "difficulty"),
    ],
)
def test_wrong_parameters_are_refused_when_the_task_is_made(
    parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TaskConfig(kind="reasoning-gym", parameters=parameters).build()


def test_only_the_right_product_is_rewarded() -> None:
    task: Any = TaskConfig().build()
    for problem in (task.problem(index) for index in range(20)):
        factors = re.search(r"(\d) \* (\d)", problem.messages[-1]["content"])
        assert factors is not None
        right = int(factors[1]) * int(factors[2])
        assert task.reward(problem, str(right)) == 1.0
        assert task.reward(problem, f"It is {right + 5}, no: {right}.") == 1.0
        for wrong in (str(right + 1), f"{right} or {right + 2}", f"{right}7", "", "none", "two"):
            assert task.reward(problem, wrong) == 0.0
    assert [m["role"] for m in problem.messages] == ["system", *["user", "assistant"] * 3, "user"]


def test_partial_credit_is_the_dataset_s_own_score() -> None:
    problem = ReasoningGym(dataset="spell_backward").problem(0)
    right = problem.entry["answer"]
    close = right[:-1]
    whole, partial = (
        ReasoningGym(dataset="spell_backward", partial_credit=share) for share in (False, True)
    )
    assert (whole.reward(problem, f" {right}\n"), partial.reward(problem, right)) == (1.0, 1.0)
    assert whole.reward(problem, close) == 0.0
    assert 0 < partial.reward(problem, close) < 1


def test_the_group_of_the_pattern_is_what_counts() -> None:
    task = ReasoningGym(dataset="chain_sum", answer_pattern=r"<answer>(.*?)</answer>")
    problem = task.problem(0)
    right = problem.entry["answer"]
    assert task.reward(problem, f"<answer>1</answer> no: <answer>{right}</answer> 7") == 1.0
    assert task.reward(problem, right) == 0.0
    assert task.final_answer("<answer>1\n2</answer>") == "1\n2"
    assert task.final_answer("none") is None


def test_what_a_scorer_cannot_read_is_wrong() -> None:
    task = ReasoningGym(dataset="prime_factorization")  # its scorer calls int() on the answer
    problem = task.problem(0)
    assert task.reward(problem, "no number at all") == 0.0
    assert task.reward(problem, problem.entry["answer"]) == 1.0


# --- mathematics ---------------------------------------------------------------------------------


def math_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    return path


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    rows = [{"problem": f"What is {i} + {i}?", "answer": 2 * i} for i in range(60)]
    return math_file(tmp_path / "sums.jsonl", rows)


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("42", ["42", "so it is $42$.", r"\boxed{\frac{84}{2}}", "42.0"], ["43", "", "no idea"]),
        (r"3\sqrt{2}", [r"\boxed{\sqrt{18}}", r"$3\sqrt{2}$"], ["3", r"\boxed{3}"]),
        (r"\frac{1}{2}", ["0.5", "1/2", r"\boxed{\dfrac12}"], ["2", r"\boxed{\frac{1}{"]),
        ("(1,2)", [r"\boxed{(1,2)}"], [r"\boxed{(2,1)}", "1"]),
        ("x^2+1", [r"\boxed{1+x^2}"], [r"\boxed{x^2-1}"]),
        ("He has 6 - 2 = 4 left.\n#### 1,234", ["1234"], ["4"]),
    ],
)
def test_equal_expressions_are_right_however_they_are_written(
    tmp_path: Path, reference: str, right: list[str], wrong: list[str]
) -> None:
    rows = [{"question": str(i), "answer": reference} for i in range(60)]
    task = MathFile(path=math_file(tmp_path / "one.jsonl", rows))
    problem = task.problem(0)
    assert [task.reward(problem, answer) for answer in right] == [1.0] * len(right)
    assert [task.reward(problem, answer) for answer in wrong] == [0.0] * len(wrong)


def test_training_goes_through_the_whole_file_in_every_epoch(sums: Path) -> None:
    task = MathFile(path=sums, eval_share=0.2)
    kept: list[MathProblem] = []
    with contextlib.suppress(IndexError):
        for index in range(61):
            kept.append(task.problem(index, "eval"))
    size = 60 - len(kept)
    with pytest.raises(IndexError):
        task.problem(len(kept), "eval")
    assert 3 <= len(kept) <= 25
    epochs = [questions(task, range(e * size, (e + 1) * size), "train") for e in range(3)]
    asked = questions(task, range(len(kept)), "eval")
    for epoch in epochs:
        assert sorted(epoch + asked) == sorted(f"What is {i} + {i}?" for i in range(60))
    assert epochs[0] != epochs[1] != epochs[2]
    assert questions(MathFile(path=sums, eval_share=0.2), range(size), "train") == epochs[0]


def test_a_file_for_evaluation_is_kept_out_of_training(sums: Path, tmp_path: Path) -> None:
    rows = [{"question": f"What is {i} + {i}?", "answer": 2 * i} for i in range(50, 70)]
    task = MathFile(path=sums, eval_path=math_file(tmp_path / "eval.jsonl", rows))
    asked = questions(task, range(20), "eval")
    assert asked == [f"What is {i} + {i}?" for i in range(50, 70)]
    trained = questions(task, range(50), "train")
    assert sorted(trained) == sorted(f"What is {i} + {i}?" for i in range(50))


@pytest.mark.parametrize("own_file", [True, False])
def test_a_question_that_stands_twice_is_evaluated_once_and_not_trained_on(
    tmp_path: Path, own_file: bool
) -> None:
    """Whatever blanks are in it; also where a file is given for evaluation."""
    texts = [f"What is {i} + 1?" for i in range(40)]
    twice = [text.replace(" ", "  ") + "\n" for text in texts]
    rows = [{"problem": text, "answer": 1} for text in (*texts, *twice)]
    path = math_file(tmp_path / "all.jsonl", rows)
    more: dict[str, Any] = {}
    if own_file:
        more["eval_path"] = math_file(tmp_path / "eval.jsonl", rows[:5] + rows[40:45])
    task = MathFile(path=path, eval_share=0.3, **more)
    kept = [" ".join(question.split()) for question in held_out(task)]
    trained = {" ".join(question.split()) for question in questions(task, range(200), "train")}
    assert len(set(kept)) == len(kept) > 4
    assert not trained & set(kept)
    assert trained | set(kept) == set(texts)


def test_a_line_that_is_no_problem_is_named(tmp_path: Path) -> None:
    for row in ('{"problem": "?"}', '{"answer": 1}', "[1]", "{"):
        path = tmp_path / f"{abs(hash(row))}.jsonl"
        path.write_text(f'{{"problem": "1?", "answer": 1}}\n\n{row}\n')
        with pytest.raises(ValueError, match=r"\.jsonl:3 is not a JSON object with"):
            MathFile(path=path)
    path = math_file(tmp_path / "two.jsonl", [{"problem": "a", "answer": 1}])
    with pytest.raises(ValueError, match="no problem is left for"):
        MathFile(path=path)


def test_mathematics_is_scored_outside_the_main_thread(sums: Path) -> None:
    """Where signals, and so math-verify's own timeouts, do not work."""
    task = MathFile(path=sums)
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(task.reward(task.problem(0), "-1")))
    thread.start()
    thread.join()
    assert found == [0.0]


def test_an_answer_that_hangs_math_verify_is_timed_out_not_wrong(tmp_path: Path) -> None:
    rows = [{"problem": str(i), "answer": "3^{10^9}"} for i in range(60)]
    task = MathFile(path=math_file(tmp_path / "hard.jsonl", rows))
    with RewardRunner(task.reward, RewardConfig(workers=1, timeout_s=3)) as runner:
        outcomes = runner.submit(task.problem(0), [r"\boxed{3^{10^9+1} - 2}", "none"]).result(120)
    assert isinstance(outcomes[0], RewardFailure)
    assert outcomes[0].kind == "timed_out"
    assert outcomes[1] == 0.0


def test_a_reference_that_cannot_be_read_is_a_failure_not_a_wrong_answer(tmp_path: Path) -> None:
    rows = [{"problem": str(i), "answer": ""} for i in range(60)]
    task = MathFile(path=math_file(tmp_path / "empty.jsonl", rows))
    with pytest.raises(ValueError, match="cannot read the reference answer"):
        task.reward(task.problem(0), "1")


def test_the_final_answer_is_the_last_boxed_one_else_the_last_number(sums: Path) -> None:
    task = MathFile(path=sums)
    assert task.final_answer(r"\boxed{1} or \boxed{\frac{1}{2} } but 7") == r"\frac{1}{2}"
    assert task.final_answer(r"first \boxed{a}, then \boxed{b and no end") == "a"
    assert task.final_answer("between 3 and -1,234.5 apples") == "-1,234.5"
    assert task.final_answer("none") is None


# --- by name -------------------------------------------------------------------------------------


class Mine:
    """A user's task, as "test_tasks:Mine"."""

    name = "mine"

    def __init__(self, word: str) -> None:
        self.word = word

    def problem(self, index: int, split: str = "train") -> MathProblem:
        return MathProblem(({"role": "user", "content": f"{split} {index}"},), self.word)

    def reward(self, problem: MathProblem, answer: str) -> float:
        return float(answer == problem.answer)


class NoTask:
    pass


def test_tasks_come_from_toml(sums: Path) -> None:
    text = f"""
    [[task]]
    kind = "reasoning-gym"
    [task.parameters]
    dataset = "chain_sum"
    system = "Only the number."
    examples = [["1 + 1 =", "2"]]
    answer_pattern = '-?\\d+'
    settings = {{ min_terms = 2, max_terms = 2 }}
    [[task]]
    kind = "math"
    parameters = {{ path = "{sums}", eval_share = 0.3 }}
    [[task]]
    kind = "test_tasks:Mine"
    parameters = {{ word = "yes" }}
    """
    tasks: list[Any] = [
        TaskConfig.model_validate(table).build() for table in tomllib.loads(text)["task"]
    ]
    assert [task.name for task in tasks] == ["reasoning-gym/chain_sum", "math/sums", "mine"]
    for task in tasks:
        assert isinstance(task, Task)
        problem: Any = task.problem(3)
        assert pickle.loads(pickle.dumps((task, problem)))[1] == problem
        right = problem.entry["answer"] if hasattr(problem, "entry") else problem.answer
        with RewardRunner(task.reward, RewardConfig(workers=1)) as runner:
            assert runner.submit(problem, [right, "none"]).result(120) == [1.0, 0.0]


def test_a_name_that_is_no_task_is_refused() -> None:
    for kind in ("reasoning gym", "math/x", "os.system", "a:b:c", ""):
        with pytest.raises(ValueError, match="pattern"):
            TaskConfig(kind=kind)
    with pytest.raises(TypeError, match="lacks name, problem or reward"):
        TaskConfig(kind="test_tasks:NoTask").build()
    with pytest.raises(ImportError):
        TaskConfig(kind="no_such_module:Task").build()
    with pytest.raises(AttributeError):
        TaskConfig(kind="test_tasks:Nothing").build()


def test_a_byte_order_mark_is_no_part_of_a_file_of_problems(tmp_path: Path) -> None:
    train, kept = tmp_path / "train.jsonl", tmp_path / "kept.jsonl"
    train.write_text('\ufeff{"problem": "a\u2028b", "answer": 1}\n')
    kept.write_text('\ufeff{"problem": "c", "answer": 2}\n')
    task = MathFile(path=train, eval_path=kept)
    assert "a\u2028b" in task.problem(0).messages[-1]["content"]
    assert "c" in task.problem(0, "eval").messages[-1]["content"]


# --- held out ------------------------------------------------------------------------------------


class Repeats(Mine):
    """Of a user: every third evaluation problem is the first again, and there are five."""

    def problem(self, index: int, split: str = "train") -> MathProblem:
        if index >= 5:
            raise IndexError(index)
        return super().problem(index % 3 if split == "eval" else index, split)


class TrainsOnly(Mine):
    def problem(self, index: int, split: str = "train") -> MathProblem:
        if split == "eval":
            raise IndexError(index)
        return super().problem(index, split)


def test_an_evaluation_asks_different_problems_or_is_refused() -> None:
    assert len(held_out_problems(Mine("x"), 7)) == 7
    assert len(held_out_problems(Mine("x"), None)) == 64
    assert len(held_out_problems(Repeats("x"), 3)) == 3
    with pytest.raises(
        BadConfig, match="task: mine asks the same in evaluation problem 3 as before"
    ):
        held_out_problems(Repeats("x"), None)
    with pytest.raises(BadConfig, match="task: mine has no problem for evaluation"):
        held_out_problems(TrainsOnly("x"), 1)
