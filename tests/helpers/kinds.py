"""Every kind of schedule, worked out token by token on the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from ead_sampler import (
    PRESETS,
    REGISTRY,
)

Raw = dict[str, Any]


def ead(t: int, raw: Raw, h: float) -> float:
    if t < raw.get("warmup", 10):
        return 1.0
    return _ead_curve(t, raw)


def _ead_curve(t: int, raw: Raw) -> float:
    numbers = {**PRESETS[raw.get("preset") or "recipe"], **raw}
    step = raw.get("step") or 0
    d = min(numbers["decay"] + numbers["decay_growth"] * step, numbers["decay_cap"])
    grown = math.exp(t / d) if t / d < 700 else math.inf
    return max(1 + raw.get("tau_max", 1.2) - grown, raw.get("tau_min", 0.1))


def reverse(t: int, raw: Raw, h: float) -> float:
    if t < raw.get("warmup", 0):
        return 1.0
    return raw.get("tau_min", 0.1) + raw.get("tau_max", 1.2) - _ead_curve(t, raw)


def falling(shape: Callable[[float], float]) -> Callable[[int, Raw, float], float]:
    def tau(t: int, raw: Raw, h: float) -> float:
        high, low = raw.get("tau_max", 1.2), raw.get("tau_min", 0.1)
        length = raw.get("length", 512) + raw.get("length_growth", 0) * (raw.get("step") or 0)
        return low + (high - low) * shape(t / length)

    return tau


def piecewise(t: int, raw: Raw, h: float) -> float:
    knots = raw["knots"]
    if t <= knots[0][0]:
        return knots[0][1]
    for (t0, tau0), (t1, tau1) in pairwise(knots):
        if t <= t1:
            return tau0 + (tau1 - tau0) * (t - t0) / (t1 - t0)
    return knots[-1][1]


def entropic(envelope: Callable[[int, Raw, float], float]) -> Callable[[int, Raw, float], float]:
    def tau(t: int, raw: Raw, h: float) -> float:
        low = raw.get("tau_min", 0.1)
        share = min(h / raw.get("entropy_scale", 3.0), 1.0) ** raw.get("exponent", 1.0)
        return low + (envelope(t, raw, h) - low) * share

    return tau


FORMULAS: dict[str, Callable[[int, Raw, float], float]] = {
    "ead": ead,
    "reverse": reverse,
    "constant": lambda t, raw, h: raw.get("tau", 1.0),
    "linear": falling(lambda x: 1 - min(x, 1)),
    "cosine": falling(lambda x: (1 + math.cos(math.pi * min(x, 1))) / 2),
    "exponential": falling(lambda x: math.exp(-x)),
    "two_stage": lambda t, raw, h: (
        raw.get("tau_max", 1.2) if t < raw.get("switch", 128) else raw.get("tau_min", 0.1)
    ),
    "piecewise": piecewise,
    "entropy": entropic(lambda t, raw, h: raw.get("tau_max", 1.2)),
    "ead+entropy": entropic(ead),
    "branch": lambda t, raw, h: (
        raw.get("tau_max", 1.2) if h > raw.get("threshold", 0.672) else raw.get("tau_min", 0.1)
    ),
    "segment": lambda t, raw, h: FORMULAS[raw["thinking"].get("schedule", "ead")](
        t, {"step": raw.get("step"), **raw["thinking"]}, h
    ),
}


def walk(raw: Raw, token_ids: Sequence[int], entropies: Sequence[float]) -> list[float]:
    """The temperature of each token of an answer, marks and thresholds followed from the start."""
    taus: list[float] = []
    origin, part, threshold = 0, raw, raw.get("threshold", 0.672)
    if raw["schedule"] == "segment":
        part = raw["thinking"]
    for t, (token, h) in enumerate(zip(token_ids, entropies, strict=True)):
        if raw["schedule"] == "branch":
            taus.append(FORMULAS["branch"](t, {**raw, "threshold": threshold}, h))
            threshold += raw.get("rate", 0.05) * ((h > threshold) - raw.get("top", 0.2))
            continue
        clock = t - origin + raw.get("position_offset", 0)
        taus.append(FORMULAS[part.get("schedule", "ead")](clock, part, h))
        if raw["schedule"] == "segment" and part is raw["thinking"]:
            if token in raw.get("end_of_thinking_token_ids", ()):
                origin, part = t + 1, raw["answer"]
            elif token in raw.get("restart_token_ids", ()):
                origin = t + 1
    return taus


_taus = st.tuples(st.floats(0.01, 10.0), st.floats(0.01, 10.0)).map(
    lambda pair: {"tau_min": min(pair), "tau_max": max(pair)}
)

_ead = st.fixed_dictionaries(
    {},
    optional={
        "preset": st.sampled_from(["paper", "recipe"]),
        "decay": st.floats(0.01, 1e5),
        "decay_growth": st.floats(0, 1e3),
        "decay_cap": st.floats(0.01, 1e5),
        "warmup": st.integers(0, 50),
    },
)

_length = st.fixed_dictionaries(
    {}, optional={"length": st.floats(0.01, 1e5), "length_growth": st.floats(0, 10.0)}
)

_entropic = st.fixed_dictionaries(
    {}, optional={"entropy_scale": st.floats(0.01, 12), "exponent": st.floats(0.1, 4)}
)

_knots = st.lists(
    st.tuples(st.integers(0, 5000), st.floats(0.01, 10)),
    min_size=1,
    max_size=16,
    unique_by=lambda knot: knot[0],
).map(lambda knots: {"knots": [[float(t), tau] for t, tau in sorted(knots)]})

_branch = st.fixed_dictionaries(
    {},
    optional={
        "top": st.floats(0.01, 0.99),
        "threshold": st.floats(0, 3),
        "rate": st.floats(0, 1),
    },
)

_switch = st.fixed_dictionaries({"switch": st.integers(0, 2000)})

_NUMBERS: dict[str, list[st.SearchStrategy[Raw]]] = {
    "ead": [_taus, _ead],
    "reverse": [_taus, _ead],
    "constant": [st.fixed_dictionaries({"tau": st.floats(0.01, 10)})],
    "linear": [_taus, _length],
    "cosine": [_taus, _length],
    "exponential": [_taus, _length],
    "two_stage": [_taus, _switch],
    "piecewise": [_knots],
    "entropy": [_taus, _entropic],
    "ead+entropy": [_taus, _ead, _entropic],
    "branch": [_taus, _branch],
}


@st.composite
def raw_schedules(draw: st.DrawFn, names: tuple[str, ...] = tuple(REGISTRY)) -> Raw:
    """JSON of a schedule of any of these kinds, without step and offset."""
    name = draw(st.sampled_from(names))
    raw: Raw = {"schedule": name}
    if name == "segment":
        raw["thinking"] = draw(raw_schedules(STATELESS))
        raw["restart_token_ids"] = draw(st.lists(st.integers(0, 9), max_size=2))
        if draw(st.booleans()):
            raw["answer"] = draw(raw_schedules(STATELESS))
            raw["end_of_thinking_token_ids"] = draw(
                st.lists(st.integers(10, 12), min_size=1, max_size=2)
            )
        return raw
    for numbers in _NUMBERS[name]:
        raw |= draw(numbers)
    return raw


STATELESS = tuple(name for name, kind in REGISTRY.items() if not kind.has_state)
