"""The schedule against the paper's formula computed here, in plain Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.closed_form import closed_form
from hypothesis import example, given
from hypothesis import strategies as st

from ead_sampler import Annealing, AnnealingError, parse_annealing

temperatures = st.floats(0.01, 10.0)
schedules = st.builds(
    lambda low_high, **rest: parse_annealing(
        {"tau_min": min(low_high), "tau_max": max(low_high), **rest}
    ),
    st.tuples(temperatures, temperatures),
    decay=st.floats(0.001, 1e6),
    decay_growth=st.floats(0.0, 1e4),
    decay_cap=st.floats(0.001, 1e6),
    warmup=st.integers(0, 200),
    step=st.none() | st.integers(0, 100_000),
    position_offset=st.integers(0, 5_000),
)


@given(schedules, st.lists(st.integers(0, 100_000), min_size=1, max_size=50))
def test_temperatures_equal_the_closed_form(schedule: Annealing, positions: list[int]) -> None:
    expected = [closed_form(t + schedule.position_offset, schedule) for t in positions]
    got = schedule.temperatures(torch.tensor(positions))
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(expected, abs=1e-12)


@given(schedules)
@example(parse_annealing({"tau_max": 1.2, "warmup": 0}))  # 1 + 1.2 - 1 > 1.2 in floats
def test_temperatures_are_finite_bounded_and_never_rise_after_the_warmup(
    schedule: Annealing,
) -> None:
    tau = schedule.temperatures(torch.arange(3000))
    assert torch.isfinite(tau).all()
    assert tau.min() >= min(schedule.tau_min, 1.0)
    assert tau.max() <= max(schedule.tau_max, 1.0)
    after = tau[max(0, schedule.warmup - schedule.position_offset) :]
    assert (after.diff() <= 0).all()


@pytest.mark.parametrize(
    ("preset", "floor_at"),
    [("recipe", 500 * math.log(2.1)), ("paper", 25 * math.log(2.1))],  # 371 and 18.5 tokens
)
def test_presets_reach_the_floor_where_the_design_says(preset: str, floor_at: float) -> None:
    tau = parse_annealing({"preset": preset}).temperatures(torch.arange(1000))
    below = [t for t in range(1000) if tau[t] == 0.1]
    assert below[0] == math.ceil(floor_at)


def test_the_default_is_the_recipe_and_explicit_numbers_win_over_a_preset() -> None:
    recipe = parse_annealing({"preset": "recipe"})
    assert parse_annealing({}).model_copy(update={"preset": "recipe"}) == recipe
    mixed = parse_annealing({"preset": "paper", "decay": 30})
    assert (mixed.decay, mixed.decay_growth, mixed.decay_cap) == (30.0, 5.0, 40_000.0)


def test_growth_with_the_step_stops_at_the_cap() -> None:
    schedule = parse_annealing({"preset": "recipe", "step": 10_000})
    assert schedule.decay_now == 800_000.0
    assert parse_annealing({"preset": "recipe", "step": 3}).decay_now == 800.0


@pytest.mark.parametrize(
    ("raw", "field", "says"),
    [
        ({"tau_max": math.nan}, "annealing.tau_max", "[0.01, 10.0], got nan"),
        ({"tau_max": math.inf}, "annealing.tau_max", "[0.01, 10.0], got inf"),
        ({"tau_max": 10.1}, "annealing.tau_max", "[0.01, 10.0], got 10.1"),
        ({"tau_min": 0.0}, "annealing.tau_min", "[0.01, 10.0], got 0.0"),
        ({"tau_min": 2.0}, "annealing.tau_min", "[0.01, tau_max = 1.2], got 2.0"),
        ({"tau_max": True}, "annealing.tau_max", "got True"),
        ({"decay": "500"}, "annealing.decay", "got '500'"),
        ({"decay": 0}, "annealing.decay", "[0.001, 1,000,000,000.0], got 0"),
        ({"warmup": 1.5}, "annealing.warmup", "an integer in [0, 1,000,000], got 1.5"),
        ({"step": -1}, "annealing.step", "[0, 1,000,000,000], got -1"),
        ({"schedule": "log"}, "annealing.schedule", "one of 'ead', 'reverse', 'constant', "),
        ({"schedule": None}, "annealing.schedule", "got None"),
        ({"preset": "other"}, "annealing.preset", "'recipe' or 'paper', got 'other'"),
        (
            {"tau": 1.0},
            "annealing.tau",
            "unknown key (did you mean tau_min?); allowed keys: schedule, step, position_offset",
        ),
        ([], "annealing", "must be an object, got []"),
        ("ead", "annealing", "must be an object, got 'ead'"),
        ({"warmup": "x" * 500}, "annealing.warmup", "..."),
    ],
)
def test_a_bad_schedule_names_field_range_and_value(raw: object, field: str, says: str) -> None:
    with pytest.raises(AnnealingError) as caught:
        parse_annealing(raw)
    assert caught.value.field == field
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300
