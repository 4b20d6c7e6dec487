"""A file of mathematics as a task."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pydantic import Field, model_validator

from trainer_bridge.tasks import math_equal, math_final
from trainer_bridge.tasks.task import Chat, Messages, Split, plain, split_of, stable_hash


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
        description="file of the evaluation problems, which are left out of training wherever they "
        "stand in `path`; None: those of `path` by eval_share",
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
        """1.0 when the final answer is equal to the reference, else 0.0; see math_equal.

        It may take for ever: the reward runner's timeout is the one that counts.
        """
        if not math_equal.readable(problem.answer):
            raise ValueError(f"cannot read the reference answer {problem.answer!r}")
        found = math_final.final_answer(answer)
        return float(found is not None and math_equal.equal(problem.answer, found))

    def final_answer(self, answer: str) -> str | None:
        """What votes, without spaces: the final answer, else the last box that is closed, else the
        last number. Only equal texts agree: 1/2 and 0.5 do not."""
        spoken = math_final.without_thinking(answer)
        if spoken is None:
            return None
        found = math_final.last_box(spoken) or math_final.last_number(spoken)
        return "".join(found.split()) if found else None

    def _rows(self, split: Split) -> tuple[tuple[str, str], ...]:
        return _math_rows(self.path, self.eval_path, self.eval_share, split)


@lru_cache(maxsize=16)
def _math_rows(
    path: Path, eval_path: Path | None, eval_share: float, split: Split
) -> tuple[tuple[str, str], ...]:
    """(question, reference answer) of a split, as the file has them; none is evaluated twice."""
    rows = _read(path)
    if eval_path is None:
        kept = [row for row in rows if split_of(plain(row[0]), eval_share) == "eval"]
    else:
        kept = list(_read(eval_path))
    known: dict[str, tuple[str, str]] = {}
    for row in kept:
        known.setdefault(plain(row[0]), row)
    if split == "eval":
        return tuple(known.values())
    return tuple(row for row in rows if plain(row[0]) not in known)


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
