"""What the schedules of one request may cost to work out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ead_sampler.names import ANNEALING
from ead_sampler.schedules import AnnealingError

# of the schedules of one request, together
MAX_MEANS = 2_000_000  # tokens of `mean_matched`: 60 ms
MAX_STRINGS = 1_024  # that mark tokens


def check_cost(each: Sequence[Any]) -> None:
    """Refuse schedules that are dear to work out and are many. Raises AnnealingError.

    each: sampling parameters of each prompt, with the schedule in them or in `custom_params`.
    """
    if len(each) <= 1:
        return
    means: dict[str, int] = {}
    strings: set[str] = set()
    for params in each:
        custom = params.get("custom_params") if isinstance(params, dict) else None
        for holder in (params, custom):
            raw = holder.get(ANNEALING) if isinstance(holder, dict) else None
            if not isinstance(raw, dict):
                continue
            for part in (raw, raw.get("thinking"), raw.get("answer")):
                matched = part.get("mean_matched") if isinstance(part, dict) else None
                tokens = matched.get("tokens") if isinstance(matched, dict) else None
                if isinstance(tokens, int):
                    means[repr(part)] = tokens
            for name in ("restart_strings", "end_of_thinking_strings"):
                marks = raw.get(name)
                strings |= (
                    {m for m in marks if isinstance(m, str)} if isinstance(marks, list) else set()
                )
    if sum(means.values()) > MAX_MEANS:
        raise AnnealingError(
            "annealing.mean_matched.tokens",
            f"of all different schedules of a request must add up to at most {MAX_MEANS:,}, "
            f"got {sum(means.values()):,}",
        )
    if len(strings) > MAX_STRINGS:
        raise AnnealingError(
            "annealing.restart_strings",
            f"must be at most {MAX_STRINGS:,} different ones in a request, got {len(strings):,}",
        )
