"""EAD's formula, by hand."""

from __future__ import annotations

import math

from ead_sampler import Annealing


def closed_form(t: int, schedule: Annealing) -> float:
    """DESIGN.md, "The schedule", one token at a time."""
    if t < schedule.warmup:
        return 1.0
    step = schedule.step or 0
    d = min(schedule.decay + schedule.decay_growth * step, schedule.decay_cap)
    try:
        grown = math.exp(t / d)
    except OverflowError:
        grown = math.inf
    return max(1 + schedule.tau_max - grown, schedule.tau_min)
