"""EAD sized for the answers that a model gives."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ead_sampler.schedules.by_position import Ead


def suggest_schedule(
    answer_lengths: Sequence[int], *, tau_max: float = 1.2, tau_min: float = 0.1
) -> Ead:
    """EAD sized for answers of these lengths (tokens): the middle one anneals over its first half.

    The presets are sized for long mathematics; a short answer ends before they have cooled at
    all. Here the floor is reached at half the median length, so the first eighth or so is sampled
    above temperature 1, as the paper's rule of thumb has it. No growth with the step: ask again
    when the answers have grown. Raises ValueError without lengths.
    """
    lengths = [length for length in answer_lengths if length > 0]
    if not lengths:
        raise ValueError("answer_lengths must hold at least one positive length")
    floor_at = max(statistics.median(lengths) / 2, 1.0)
    # the floor is where exp(t / d) = 1 + tau_max - tau_min
    decay = floor_at / math.log(1 + tau_max - tau_min) if tau_max > tau_min else floor_at
    above_one = decay * math.log(tau_max) if tau_max > 1 else 0.0
    return Ead.model_validate(
        {
            "tau_max": tau_max,
            "tau_min": tau_min,
            "decay": decay,
            "decay_growth": 0.0,
            "decay_cap": decay,
            "warmup": min(10, int(above_one)),
        }
    )
