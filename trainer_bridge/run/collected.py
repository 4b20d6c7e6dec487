"""The scored answers of one step, and the file that keeps those of later steps in a checkpoint.

Answers that were generated ahead are from weights that a resumed run does not have any more: it
could not ask for them again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from trainer_bridge.policy.batch import Sample
from trainer_bridge.policy.trainer import ScoredAnswers

_OF_TRAINED = ("temperatures", "behaviour_logprobs", "model_logprobs")  # arrays of a Sample


@dataclass(frozen=True)
class Collected:
    """What one step is trained on, and where the next one's problems begin."""

    answers: ScoredAnswers
    position: int
    metrics: dict[str, float]
    texts: tuple[str, ...] = field(repr=False)

    def told(self) -> Iterator[dict[str, Any]]:
        """The answers as a reader wants them."""
        for sample, reward, group, text in zip(
            self.answers.samples,
            self.answers.rewards,
            self.answers.group_ids,
            self.texts,
            strict=True,
        ):
            temperatures = [round(float(tau), 4) for tau in sample.temperatures]
            yield {"problem": group, "reward": reward, "text": text, "temperatures": temperatures}


def save_steps(steps: Sequence[Collected], file: Path) -> None:
    """Write successive steps, as safetensors. Raises OSError."""
    samples = [sample for step in steps for sample in step.answers.samples]
    columns = ("token_ids", "trained", *_OF_TRAINED)
    arrays = {
        name: np.concatenate([getattr(sample, name) for sample in samples])
        if samples
        else np.empty(0)
        for name in columns
    }
    about = [
        {
            "rewards": list(step.answers.rewards),
            "group_ids": list(step.answers.group_ids),
            "behind": list(step.answers.behind),
            "lengths": [len(sample) for sample in step.answers.samples],
            "position": step.position,
            "metrics": step.metrics,
            "texts": step.texts,
        }
        for step in steps
    ]
    # as an array, since what safetensors says about a file may not be over 100 MB
    arrays["json"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    file.write_bytes(save(arrays))


def load_steps(file: Path) -> tuple[Collected, ...]:
    """What `save_steps` wrote."""
    with safe_open(file, framework="numpy") as opened:
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    about = json.loads(arrays["json"].tobytes())
    steps, samples = [], _samples(arrays, [n for step in about for n in step["lengths"]])
    for step in about:
        answers = ScoredAnswers(
            [next(samples) for _ in step["lengths"]],
            step["rewards"],
            step["group_ids"],
            step["behind"],
        )
        steps.append(Collected(answers, step["position"], step["metrics"], tuple(step["texts"])))
    return tuple(steps)


def _samples(arrays: dict[str, NDArray[Any]], lengths: Sequence[int]) -> Iterator[Sample]:
    first = first_trained = 0
    for length in lengths:
        trained = arrays["trained"][first : first + length]
        until = first_trained + int(trained.sum())
        columns = (arrays[name][first_trained:until] for name in _OF_TRAINED)
        yield Sample(arrays["token_ids"][first : first + length], trained, *columns)
        first, first_trained = first + length, until
