"""Every kind of schedule against its formula in plain Python floats, one token at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.kinds import (
    _NUMBERS,
    FORMULAS,
    STATELESS,
    Raw,
    raw_schedules,
)
from hypothesis import given
from hypothesis import strategies as st

from ead_sampler import (
    REGISTRY,
    Annealing,
    AnnealingError,
    parse_annealing,
    suggest_schedule,
)
from ead_sampler.schedules import Branch, Segment

# --- the formulas, written again ---------------------------------------------------------------


# --- random schedules of every kind ------------------------------------------------------------


BY_POSITION = tuple(name for name in STATELESS if not REGISTRY[name].uses_entropy)


def test_every_kind_has_its_formula_here() -> None:
    assert set(FORMULAS) == set(REGISTRY) == {*_NUMBERS, "segment"}


@given(
    raw_schedules(),
    st.none() | st.integers(0, 10_000),
    st.integers(0, 3000),
    st.lists(st.tuples(st.integers(0, 20_000), st.floats(0, 12)), min_size=1, max_size=20),
)
def test_every_kind_equals_its_formula(
    raw: Raw, step: int | None, offset: int, tokens: list[tuple[int, float]]
) -> None:
    if raw["schedule"] == "branch" and "threshold" not in raw:
        offset = 0  # or it is refused
    raw = {**raw, "step": step, "position_offset": offset}
    expected = [FORMULAS[raw["schedule"]](t + offset, raw, h) for t, h in tokens]
    positions = torch.tensor([t for t, _ in tokens])
    entropies = torch.tensor([h for _, h in tokens], dtype=torch.float64)
    schedule = parse_annealing(raw)
    got = schedule.temperatures(positions, entropies)
    assert got.tolist() == pytest.approx(expected, abs=1e-9)
    low, high = schedule.bounds()
    assert (got >= low - 1e-12).all()
    assert (got <= high + 1e-12).all()
    assert parse_annealing(schedule.model_dump()) == schedule  # as it travels to the scheduler


def extremes(kind: type[Any]) -> dict[str, list[Any]]:
    """The lowest and the highest value that each number of a kind may have."""
    found: dict[str, list[Any]] = {}
    for name, field in kind.model_fields.items():
        bounds = {type(m).__name__: m for m in field.metadata}
        if {"Ge", "Le"} <= set(bounds):
            found[name] = [bounds["Ge"].ge, bounds["Le"].le]
    return found


@given(st.sampled_from([n for n in REGISTRY if n not in ("segment", "piecewise")]), st.data())
def test_no_number_in_range_makes_a_temperature_out_of_range(name: str, data: Any) -> None:
    """At the ends of all ranges at once, at the first and the last of positions and entropies."""
    choices = {key: st.sampled_from(values) for key, values in extremes(REGISTRY[name]).items()}
    raw = {"schedule": name, **data.draw(st.fixed_dictionaries({}, optional=choices))}
    if name in BY_POSITION and data.draw(st.booleans()):
        tau = data.draw(st.sampled_from([0.01, 1.0, 10.0]))
        tokens = data.draw(st.sampled_from([1, 100_000]))
        raw["mean_matched"] = {"temperature": tau, "tokens": tokens}
    try:
        schedule = parse_annealing(raw)
    except AnnealingError:  # tau_min above tau_max, or a mean that cannot be had
        return
    positions = [0, 1, 10, 371, 10**6, 10**8]
    for entropy in (0.0, 1e-30, 1e-3, 12.0, 1e6, math.inf):
        entropies = torch.full((len(positions),), entropy, dtype=torch.float64)
        tau = schedule.temperatures(torch.tensor(positions), entropies)
        assert tau.isfinite().all(), raw
        assert (tau >= 0.01 * (1 - 1e-9)).all(), raw
        assert (tau <= 10.0 * (1 + 1e-9)).all(), raw


@pytest.mark.parametrize("preset", ["recipe", "paper"])
@pytest.mark.parametrize("step", [0, 10, 400, 10_000])
def test_presets_at_every_position_and_training_step(preset: str, step: int) -> None:
    """The two sets of numbers of DESIGN.md, written out here."""
    start, growth, cap = {"recipe": (500, 100, 800_000), "paper": (25, 5, 40_000)}[preset]
    d = min(start + growth * step, cap)
    expected = []
    for t in range(4097):
        grown = math.exp(t / d) if t / d < 700 else math.inf
        expected.append(1.0 if t < 10 else max(1 + 1.2 - grown, 0.1))
    got = parse_annealing({"preset": preset, "step": step}).temperatures(torch.arange(4097))
    assert got.tolist() == pytest.approx(expected, abs=1e-12)


@given(raw_schedules(BY_POSITION), st.floats(0.02, 5), st.integers(1, 3000))
def test_mean_matched_has_the_given_mean_or_is_refused(raw: Raw, mean: float, tokens: int) -> None:
    matched = {**raw, "mean_matched": {"temperature": mean, "tokens": tokens}}
    plain = parse_annealing(raw).temperatures(torch.arange(tokens))
    low, high = parse_annealing(raw).bounds()
    scale = mean / (sum(plain.tolist()) / tokens)
    if low * scale > 0.01 * 1.001 and high * scale < 10 * 0.999:
        got = parse_annealing(matched).temperatures(torch.arange(tokens))
        assert sum(got.tolist()) / tokens == pytest.approx(mean, rel=1e-9)
        assert got.tolist() == pytest.approx((plain * scale).tolist(), rel=1e-9)
    elif low * scale < 0.01 * 0.999 or high * scale > 10 * 1.001:
        with pytest.raises(AnnealingError, match=r"annealing.mean_matched.temperature: must leave"):
            parse_annealing(matched)


@given(st.lists(st.integers(1, 50_000), min_size=1, max_size=50))
def test_a_suggested_schedule_anneals_answers_of_those_lengths(lengths: list[int]) -> None:
    schedule = suggest_schedule(lengths)
    median = sorted(lengths)[len(lengths) // 2]  # the upper one
    tau = schedule.temperatures(torch.arange(max(median, 2)))
    assert tau[-1] == pytest.approx(0.1) or median < 4
    half = schedule.temperatures(torch.arange(max(1, math.floor(median * 0.2))))
    if len(set(lengths)) == 1 and median > 10:
        assert half[-1] > 0.5  # and not all at once
    assert schedule.temperatures(torch.tensor([0])).item() in (1.0, 1.2)


def test_short_answers_do_not_anneal_with_the_presets_numbers_but_with_suggested_ones() -> None:
    short = torch.tensor([79])
    assert parse_annealing({"preset": "recipe"}).temperatures(short).item() > 1.0
    assert suggest_schedule([60, 80, 100]).temperatures(short).item() == pytest.approx(0.1)
    with pytest.raises(ValueError, match="at least one positive length"):
        suggest_schedule([])


def test_the_branch_threshold_settles_where_the_share_is_right() -> None:
    """4,000 exponential entropies: a share of 0.2 lies above ln 5 = 1.609 nats.

    Robbins-Monro at rate 0.05 leaves an error of about 0.05 in the threshold and 0.01 in the share.
    """
    generator = torch.Generator().manual_seed(3)
    entropies = -torch.log(torch.rand(6000, generator=generator, dtype=torch.float64))
    schedule = parse_annealing({"schedule": "branch", "top": 0.2, "threshold": 0.1, "rate": 0.05})
    numbers = schedule.numbers(entropies[:1])
    threshold = numbers[2]
    hot = 0
    for index, h in enumerate(entropies):
        hot += int(h > threshold) if index >= 2000 else 0
        threshold = Branch.next_number(threshold, numbers, h.view(1))
    assert hot / 4000 == pytest.approx(0.2, abs=0.03)
    assert threshold.item() == pytest.approx(math.log(5), abs=0.5)


# --- what is refused ---------------------------------------------------------------------------

EAD = {"schedule": "ead"}


@pytest.mark.parametrize(
    ("raw", "field", "says"),
    [
        ({"schedule": "piecewise"}, "annealing.knots", "is required"),
        ({"schedule": "piecewise", "knots": []}, "annealing.knots", "at least 1 item"),
        ({"schedule": "piecewise", "knots": [[0, 1]] * 17}, "annealing.knots", "at most 16"),
        ({"schedule": "piecewise", "knots": [[0]]}, "annealing.knots[0]", "must be [t, tau]"),
        ({"schedule": "piecewise", "knots": [[5, 1], [5, 1]]}, "annealing.knots[1]", "rising"),
        ({"schedule": "piecewise", "knots": [[0, 11]]}, "annealing.knots[0]", "[0.01, 10.0]"),
        ({"schedule": "piecewise", "knots": [[-1, 1]]}, "annealing.knots[0]", "t must be in [0"),
        ({"schedule": "piecewise", "knots": [["0", 1]]}, "annealing.knots[0][0]", "got '0'"),
        ({"schedule": "linear", "length": 0}, "annealing.length", "[0.001, 1,000,000,000.0]"),
        ({"tau_mx": 1.1}, "annealing.tau_mx", "unknown key (did you mean tau_max?); allowed keys"),
        ({"schedule": "linear", "decay": 5}, "annealing.decay", "unknown key; allowed keys"),
        ({"schedule": "constant", "tau": 0}, "annealing.tau", "[0.01, 10.0], got 0"),
        ({"schedule": "two_stage", "switch": 1.5}, "annealing.switch", "an integer in [0, "),
        ({"schedule": "entropy", "exponent": 0}, "annealing.exponent", "[0.01, 100.0], got 0"),
        ({"schedule": "branch", "top": 1}, "annealing.top", "[0.001, 0.999], got 1"),
        (
            {"schedule": "branch", "position_offset": 1},
            "annealing.threshold",
            "is required with position_offset",
        ),
        (
            {"schedule": "entropy", "mean_matched": {"temperature": 1.0, "tokens": 9}},
            "annealing.mean_matched",
            "unknown key",
        ),
        ({"mean_matched": 1.0}, "annealing.mean_matched", "must be an object, got 1.0"),
        (
            {"mean_matched": {"temperature": 1.0, "tokens": 0}},
            "annealing.mean_matched.tokens",
            "must be an integer in [1, 100,000], got 0",
        ),
        ({"mean_matched": {"tokens": 5}}, "annealing.mean_matched.temperature", "is required"),
        ({"schedule": "segment"}, "annealing.thinking", "is required"),
        (
            {"schedule": "segment", "thinking": {"tau_max": 99}},
            "annealing.thinking.tau_max",
            "[0.01, 10.0], got 99",
        ),
        (
            {"schedule": "segment", "thinking": {"schedule": "branch"}},
            "annealing.thinking.schedule",
            "must be one of ead, reverse",
        ),
        (
            {"schedule": "segment", "thinking": EAD, "answer": EAD},
            "annealing.end_of_thinking_token_ids",
            "answer needs an end",
        ),
        (
            {"schedule": "segment", "thinking": EAD, "end_of_thinking_token_ids": [1]},
            "annealing.answer",
            "end_of_thinking_* needs answer",
        ),
        (
            {"schedule": "segment", "thinking": EAD, "restart_token_ids": [-1]},
            "annealing.restart_token_ids[0]",
            "must be an integer in [0, 2^31), got -1",
        ),
        (
            {"schedule": "segment", "thinking": EAD, "restart_strings": [""]},
            "annealing.restart_strings[0]",
            "1 to 100 characters",
        ),
        (
            {"schedule": "segment", "thinking": {**EAD, "position_offset": 3}},
            "annealing.thinking.position_offset",
            "belongs to the whole schedule",
        ),
    ],
)
def test_bad_numbers_are_named_with_their_range(raw: Raw, field: str, says: str) -> None:
    with pytest.raises(AnnealingError) as caught:
        parse_annealing(raw)
    assert caught.value.field == field
    assert says in str(caught.value)


def test_the_initial_state_of_a_resumed_segment_follows_from_its_earlier_tokens() -> None:
    """Marks: 1 restarts the clock, 2 ends thinking, after which 1 and 2 mean nothing."""
    fields = {"restart_token_ids": [1], "answer": EAD, "end_of_thinking_token_ids": [2]}
    resumed = segment(**fields, position_offset=5)
    assert resumed.initial_state([0, 0, 0, 0, 0]) == (0, 0, 0)
    assert resumed.initial_state([0, 1, 0, 0, 1]) == (5, 0, 0)
    assert resumed.initial_state([1, 0, 2, 1, 2]) == (3, 1, 0)
    assert resumed.initial_state([1, 0]) == (4, 0, 0)  # the prompt holds only the last two


# --- strings to tokens -------------------------------------------------------------------------


class Letters:
    """A tokenizer of five tokens."""

    texts = ("a", "b", ".\n\n", "\n\n\n", "</think>")

    def __len__(self) -> int:
        return len(self.texts)

    def batch_decode(self, ids: list[list[int]]) -> list[str]:
        return ["".join(self.texts[i] for i in each) for each in ids]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [self.texts.index(letter) for letter in text]


def segment(**fields: Any) -> Annealing:
    return parse_annealing({"schedule": "segment", "thinking": EAD, **fields})


def test_strings_mark_every_token_that_contains_them() -> None:
    schedule = segment(
        restart_strings=["\n\n"],
        restart_token_ids=[1],
        answer=EAD,
        end_of_thinking_strings=["</think>"],
    ).resolved(Letters())
    assert isinstance(schedule, Segment)
    assert schedule.restart_token_ids == [1, 2, 3]
    assert schedule.end_of_thinking_token_ids == [4]
    assert parse_annealing(schedule.model_dump()).resolved(Letters()) == schedule


def test_a_string_of_several_tokens_is_refused_with_its_tokens() -> None:
    with pytest.raises(
        AnnealingError, match=r"no single token .* contains 'ab' \(it is 2: \[0, 1]"
    ):
        segment(restart_strings=["ab"]).resolved(Letters())
    with pytest.raises(AnnealingError, match="needs a tokenizer"):
        segment(restart_strings=["ab"]).resolved(None)


@given(
    length=st.floats(1, 1e6),
    taus=st.tuples(st.floats(0.05, 5.0), st.floats(0.05, 5.0)),
)
def test_a_length_makes_ead_reach_its_floor_halfway(
    length: float, taus: tuple[float, float]
) -> None:
    """By the paper's formula, solved for d at t = length / 2 in float64."""
    tau_min, tau_max = sorted(taus)
    raw = {"length": length, "tau_max": tau_max, "tau_min": tau_min}
    schedule = parse_annealing(raw)
    half = max(length / 2, 1.0)
    if tau_max > tau_min + 1e-3:
        floor = 1 + tau_max - math.exp(half / schedule.decay)
        assert floor == pytest.approx(tau_min, abs=1e-6)
    assert schedule.decay_now == schedule.decay
    assert schedule.warmup <= min(10, half)
    assert parse_annealing(schedule.model_dump()) == schedule  # as it travels, and comes back
    assert parse_annealing({**raw, "warmup": 3}).warmup == 3
    reverse = parse_annealing({**raw, "schedule": "reverse"})
    assert (reverse.decay, reverse.warmup) == (schedule.decay, 0)  # it begins cool


@pytest.mark.parametrize(
    ("fields", "field", "wanted"),
    [
        ({"length": 0}, "annealing.length", "[1.0, 1,000,000,000.0], got 0"),
        ({"length": "64"}, "annealing.length", "number"),
        ({"length": 1e12}, "annealing.length", "[1.0, 1,000,000,000.0], got"),
        ({"length": 64, "preset": "paper"}, "annealing.length", "combined with preset"),
        ({"length": 64, "decay_growth": 5.0}, "annealing.length", "combined with decay_growth"),
        ({"length": 64, "tau_max": 0.1, "tau_min": 1.2}, "annealing.tau_min", "tau_max = 0.1]"),
        ({"length": 64, "tau_max": "x"}, "annealing.tau_max", "got 'x'"),
    ],
)
def test_a_length_that_cannot_be_used_is_refused_by_its_name(
    fields: dict[str, Any], field: str, wanted: str
) -> None:
    with pytest.raises(AnnealingError) as refused:
        parse_annealing(fields)
    assert refused.value.field == field
    assert wanted in refused.value.message
