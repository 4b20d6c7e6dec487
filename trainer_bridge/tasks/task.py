"""Tasks: endless, reproducible problems and the function that scores answers to them.

Two are built in, any dataset of reasoning-gym and a file of mathematics; a user's own is named as
"module:object". They are settings and nothing else, so that they travel to reward workers as they
are; what is heavy is made where it is first used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import Field

from trainer_bridge.settings import Settings
from trainer_bridge.tasks.rewards import RewardFunction

Split = Literal["train", "eval"]
Messages = tuple[dict[str, str], ...]


class Problem(Protocol):
    """Something to solve, asked as a chat. Picklable; it holds what its reward needs."""

    @property
    def messages(self) -> Sequence[Mapping[str, str]]: ...


@runtime_checkable
class Task(Protocol):
    """Problems by number, and how their answers are scored.

    A task may also have `final_answer(answer: str) -> str | None`: the part of an answer that votes
    in maj@k, None where there is none.
    """

    @property
    def name(self) -> str: ...

    @property
    def reward(self) -> RewardFunction: ...

    def problem(self, index: int, split: Split = "train") -> Problem:
        """The same for the same index (0, 1, ...), for ever; no problem is in both splits.

        Raises IndexError beyond the last problem, where there is a last one.
        """
        ...


_BUILT_IN = {
    "reasoning-gym": "trainer_bridge.tasks.gym:ReasoningGym",
    "math": "trainer_bridge.tasks.math:MathFile",
}


# Of these, SmolLM2-135M-Instruct answers a fifth at temperature 1, and two thirds greedily. There
# are 55, in any order of the factors.
PRODUCTS = {
    "dataset": "products",
    "settings": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "system": "Answer with the number only.",
    "examples": (("3 * 3 =", "9"), ("5 * 0 =", "0"), ("2 * 7 =", "14")),
    "answer_pattern": r"-?\d+",
    "eval_share": 0.3,
}


class TaskConfig(Settings):
    """Which task, with which parameters. Without any: one that the embedded model can learn."""

    kind: str = Field(
        "reasoning-gym",
        description='"reasoning-gym", "math", or "module:object" for a task of your own, called '
        "with the parameters",
        pattern=r"^(reasoning-gym|math|[\w.]+:[\w.]+)$",
    )
    parameters: dict[str, Any] = Field(
        default_factory=lambda data: PRODUCTS if data["kind"] == "reasoning-gym" else {},
        description="of the task, see its class; reasoning-gym's default: products of two digits",
    )

    def maker(self) -> Any:
        """What makes the task of its parameters. Raises ImportError, AttributeError."""
        return _named(_BUILT_IN.get(self.kind, self.kind))

    def build(self) -> Task:
        """The task. Raises ValueError or TypeError for wrong parameters, ImportError."""
        task = self.maker()(**self.parameters)
        if not isinstance(task, Task):
            raise TypeError(f"{self.kind} made {task!r:.100}, which lacks name, problem or reward")
        return task


def _named(path: str) -> Any:
    module, _, names = path.partition(":")
    found: Any = import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


class Chat(Settings):
    """How questions are asked, and which of them are kept for evaluation."""

    system: str = Field(default="", description="system message; empty: none")
    examples: tuple[tuple[str, str], ...] = Field(
        default=(), description="worked examples, (question, answer), before each question"
    )
    seed: int = Field(default=0, description="of the order of the training problems")
    eval_share: float = Field(
        default=0.1, gt=0, lt=1, description="share of all questions that is kept for evaluation"
    )

    def ask(self, question: str) -> Messages:
        system = [{"role": "system", "content": self.system}] if self.system else []
        turns = [
            {"role": role, "content": text}
            for example in self.examples
            for role, text in zip(("user", "assistant"), example, strict=True)
        ]
        return (*system, *turns, {"role": "user", "content": question})


def plain(question: str) -> str:
    """The question without what nobody sees: texts that differ by blanks alone are one question."""
    return " ".join(question.split())


def split_of(question: str, eval_share: float) -> Split:
    """By the question's text alone: whatever else differs, no question is in both."""
    return "eval" if stable_hash("split", question) < eval_share * 2**64 else "train"


def stable_hash(*parts: str | int) -> int:
    """A hash in [0, 2^64) that is the same in every process and version."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8])
