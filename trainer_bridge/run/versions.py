"""Names of weight versions: RUN-ID:STEP, so that two runs on one server never train on each other's
answers, and a run that goes on recognises its own."""

from __future__ import annotations

import secrets
from dataclasses import dataclass


def new_run_id() -> str:
    """For a run that begins; it keeps it in its checkpoints."""
    return secrets.token_hex(4)


@dataclass(frozen=True)
class Versions:
    """The versions of one run."""

    run_id: str  # without a colon

    def name(self, step: int) -> str:
        """Of the weights that `step` is sampled from: those after `step` updates."""
        return f"{self.run_id}:{step}"

    def step(self, version: str) -> int | None:
        """The step in a version's name; None when it is no version of this run."""
        run_id, _, step = version.rpartition(":")
        own = run_id == self.run_id and step.isascii() and step.isdecimal()
        return int(step) if own and str(int(step)) == step else None
