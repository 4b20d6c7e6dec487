"""A file of mathematics as a task, its answers compared by math-verify."""

from __future__ import annotations

import json
import logging
import random
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from trainer_bridge.tasks import Chat, Messages, Split, split_of, stable_hash


@dataclass(frozen=True)
class MathProblem:
    """A question as a chat, and the reference answer in LaTeX or plain."""

    messages: Messages
    answer: str


class MathFile(Chat):
    """A file of mathematics, one JSON object per line: {"problem" or "question", "answer"}.

    Of a worked solution that ends in "#### 42" (GSM8K's), what follows the mark is the answer.
    Training goes through the file again and again, each time in another order.
    """

    path: Path
    eval_path: Path | None = Field(
        default=None,
        description="file of the evaluation problems, which are left out of training; None: those "
        "of `path` by eval_share",
    )
    system: str = "Reason step by step, and put the final answer within \\boxed{}."

    @property
    def name(self) -> str:
        return f"math/{self.path.stem}"

    @model_validator(mode="after")
    def _has_both(self) -> MathFile:
        for split in ("train", "eval"):
            if not self._rows(split):
                raise ValueError(f"no problem is left for {split}")
        return self

    def problem(self, index: int, split: Split = "train") -> MathProblem:
        """See Task."""
        if index < 0:
            raise IndexError(index)
        rows = self._rows(split)
        if split == "train":
            epoch, position = divmod(index, len(rows))
            question, answer = rows[_order(len(rows), self.seed, epoch)[position]]
        else:
            question, answer = rows[index]
        return MathProblem(self.ask(question), answer)

    def reward(self, problem: MathProblem, answer: str) -> float:
        """1.0 when math-verify finds the answer equal to the reference, else 0.0.

        It may take for ever: the reward runner's timeout is the one that counts, since
        math-verify's own needs signals of the main thread, and would turn into a reward of 0.
        """
        parse, verify = _math_verify()
        # without \boxed, only the first number of "3\sqrt{2}" would be found
        reference = parse(f"\\boxed{{{problem.answer}}}", parsing_timeout=None)
        if not reference:
            raise ValueError(f"math-verify cannot read the reference answer {problem.answer!r}")
        found = parse(answer, parsing_timeout=None)
        return float(verify(reference, found, timeout_seconds=None))

    def final_answer(self, answer: str) -> str | None:
        """The content of the last \\boxed{}, else the last number, without spaces. In votes only
        equal texts agree: 1/2 and 0.5 do not."""
        found = _boxed(answer) or next(reversed(re.findall(r"-?\d[\d,]*(?:\.\d+)?", answer)), None)
        return re.sub(r"\s", "", found) if found else None

    def _rows(self, split: Split) -> tuple[tuple[str, str], ...]:
        return _math_rows(self.path, self.eval_path, self.eval_share, split)


@lru_cache(maxsize=16)
def _math_rows(
    path: Path, eval_path: Path | None, eval_share: float, split: Split
) -> tuple[tuple[str, str], ...]:
    """(question, reference answer) of a split, in the order of the file."""
    rows = _read(path)
    if eval_path is None:
        return tuple(row for row in rows if split_of(row[0], eval_share) == split)
    kept = _read(eval_path)
    if split == "eval":
        return kept
    known = {question for question, _ in kept}
    return tuple(row for row in rows if row[0] not in known)


@lru_cache(maxsize=4)
def _read(path: Path) -> tuple[tuple[str, str], ...]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question = row["problem"] if "problem" in row else row["question"]
            rows.append((str(question), str(row["answer"]).rsplit("####", 1)[-1].strip()))
        except (ValueError, KeyError, TypeError) as error:
            wanted = 'a JSON object with "problem" or "question", and "answer"'
            raise ValueError(f"{path}:{number} is not {wanted}: {error!r}") from error
    return tuple(rows)


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    """The numbers below `count`, shuffled by what Python promises never to change."""
    generator = random.Random(stable_hash("order", seed, epoch))
    return sorted(range(count), key=lambda _: generator.random())


def _boxed(answer: str) -> str | None:
    """What stands in the braces of the last complete \\boxed{}."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\{", answer)]):
        depth = 1
        for end in range(start, len(answer)):
            depth += {"{": 1, "}": -1}.get(answer[end], 0)
            if depth == 0:
                return answer[start:end]
    return None


@lru_cache(maxsize=1)
def _math_verify() -> tuple[Any, Any]:
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # that there is no timeout, we know
    return math_verify.parse, math_verify.verify
