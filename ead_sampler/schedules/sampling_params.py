"""The sampling parameters that a schedule goes with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ead_sampler.errors import AnnealingError, FieldError
from ead_sampler.schedules.base import short_repr


def check_sampling(params: Mapping[str, Any]) -> None:
    """With a schedule, the temperature is the schedule's alone. Raises FieldError."""
    temperature, top_k = params.get("temperature"), params.get("top_k")
    if temperature is not None and temperature != 1:
        raise AnnealingError(
            "temperature",
            f"must be absent or 1 together with annealing, got {short_repr(temperature)}",
        )
    if top_k == 1:
        raise AnnealingError("top_k", "must not be 1 (greedy) together with annealing")
    check_beam_width(params.get("beam_width"))


def check_beam_width(beam_width: object) -> None:
    """Neither a schedule nor a rollout goes with beam search. Raises FieldError."""
    if beam_width is not None and beam_width != 1:
        raise FieldError("beam_width", "beam search does not sample: must be 1 or absent")
