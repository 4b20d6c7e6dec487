"""EAD sized for the answers that a model gives."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ead_sampler.schedules.by_position import Ead


def suggest_schedule(
    answer_lengths: Sequence[int], *, tau_max: float = 1.2, tau_min: float = 0.1
) -> Ead:
    """EAD with the median of these lengths (tokens) as its `length`.

    The presets are sized for long mathematics; a short answer ends before they have cooled at
    all. The suggested schedule does not grow with the step: ask again when the answers have grown.
    Raises ValueError without lengths.
    """
    lengths = [length for length in answer_lengths if length > 0]
    if not lengths:
        raise ValueError("answer_lengths must hold at least one positive length")
    numbers = {"tau_max": tau_max, "tau_min": tau_min, "length": statistics.median(lengths)}
    return Ead.model_validate(numbers)
