"""pass@k, worst@k, maj@k, mean@k and their intervals, against enumeration and scipy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from itertools import combinations, product
from math import prod

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from trainer_bridge.algorithms.estimators import (
    bootstrap_interval,
    maj_at_k,
    mean_at_k,
    pass_at_k,
    worst_at_k,
)

NAN = float("nan")
ROWS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 1.0, 1.5, -2.0]), st.sampled_from(["a", "b", "c", None])),
    min_size=1,
    max_size=8,
)


def majority(votes: tuple[str | None, ...], worth: dict[str | None, float]) -> float:
    """The definition, of one draw."""
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return worth[None]
    winners = [vote for vote, count in counts.items() if count == max(counts.values())]
    return sum(worth[vote] for vote in winners) / len(winners)


def worth_of(row: list[tuple[float, str | None]]) -> dict[str | None, float]:
    return {
        vote: float(np.mean([reward for reward, other in row if other == vote])) for _, vote in row
    }


@given(ROWS, st.integers(1, 8))
def test_every_estimate_is_the_mean_over_all_subsets(
    row: list[tuple[float, str | None]], k: int
) -> None:
    rewards = np.array([[reward for reward, _ in row]])
    votes = [[vote for _, vote in row]]
    got = [pass_at_k(rewards, k), worst_at_k(rewards, k), maj_at_k(rewards, votes, k)]
    if len(row) < k:
        assert np.isnan(got).all()
        return
    draws = list(combinations(row, k))
    worth = worth_of(row)
    want = [
        np.mean([any(reward >= 1.0 for reward, _ in draw) for draw in draws]),
        np.mean([min(reward for reward, _ in draw) for draw in draws]),
        np.mean([majority(tuple(vote for _, vote in draw), worth) for draw in draws]),
    ]
    assert np.concatenate(got) == pytest.approx(want, abs=1e-12)
    assert mean_at_k(rewards) == pytest.approx(np.mean(rewards))


@given(
    st.lists(
        st.tuples(st.sampled_from([0.1, 0.2, 0.7, 1.0, -1e300]), st.sampled_from("abcd")),
        min_size=1,
        max_size=7,
    ),
    st.integers(1, 7),
)
def test_every_estimate_is_rounded_once(row: list[tuple[float, str]], k: int) -> None:
    """The float that is nearest to the mean over all subsets, in fractions."""
    if len(row) < k:
        return
    exact = [(Fraction(reward), vote) for reward, vote in row]
    worth = {
        vote: Fraction(sum(votes := [reward for reward, other in exact if other == vote]))
        / len(votes)
        for _, vote in exact
    }

    def mean(values: Iterable[Fraction]) -> float:
        found = list(values)
        return float(sum(found, Fraction(0)) / len(found))

    def of(draw: tuple[tuple[Fraction, str], ...]) -> Fraction:
        counts = Counter(vote for _, vote in draw)
        winners = [worth[vote] for vote, count in counts.items() if count == max(counts.values())]
        return sum(winners, Fraction(0)) / len(winners)

    draws = list(combinations(exact, k))
    rewards = np.array([[reward for reward, _ in row]])
    got = [
        mean_at_k(rewards)[0],
        pass_at_k(rewards, k)[0],
        worst_at_k(rewards, k)[0],
        maj_at_k(rewards, [[vote for _, vote in row]], k)[0],
    ]
    assert got == [
        mean(reward for reward, _ in exact),
        mean(Fraction(any(reward >= 1 for reward, _ in draw)) for draw in draws),
        mean(min(reward for reward, _ in draw) for draw in draws),
        mean(of(draw) for draw in draws),
    ]


@given(st.integers(1, 300), st.data())
def test_pass_and_worst_at_k_are_scipy_s_hypergeometric_probabilities(
    n: int, data: st.DataObject
) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    rewards = np.zeros((1, n))
    rewards[0, :c] = 1.0
    drawn = scipy.stats.hypergeom(n, c, k)  # right answers among k drawn
    assert pass_at_k(rewards, k)[0] == pytest.approx(1 - drawn.pmf(0), abs=1e-9)
    assert worst_at_k(rewards, k)[0] == pytest.approx(drawn.pmf(k), abs=1e-9)


@given(st.integers(1, 64), st.data())
def test_what_is_always_solved_is_exactly_one(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    ones = np.ones((1, n))
    assert pass_at_k(ones, k)[0] == worst_at_k(ones, k)[0] == 1.0
    assert pass_at_k(ones * 0, k)[0] == worst_at_k(ones * 0, k)[0] == 0.0


def test_estimates_from_n_answers_are_unbiased_for_k_draws_of_the_policy() -> None:
    """By enumeration of all sequences of 5 answers of a policy of three answers."""
    policy = {"a": 0.5, "b": 0.3, None: 0.2}
    worth = {"a": 0.0, "b": 1.0, None: 0.0}
    n, k = 5, 3

    def expectation(count: int, of: object) -> float:
        assert callable(of)
        sequences = product(policy, repeat=count)
        return sum(prod(policy[vote] for vote in drawn) * of(drawn) for drawn in sequences)

    def rewards(drawn: tuple[str | None, ...]) -> np.ndarray:
        return np.array([[worth[vote] for vote in drawn]])

    assert expectation(n, lambda d: pass_at_k(rewards(d), k)[0]) == pytest.approx(
        1 - (1 - policy["b"]) ** k
    )
    assert expectation(n, lambda d: worst_at_k(rewards(d), k)[0]) == pytest.approx(policy["b"] ** k)
    assert expectation(n, lambda d: maj_at_k(rewards(d), [d], k)[0]) == pytest.approx(
        expectation(k, lambda d: majority(d, worth))
    )
    assert expectation(n, lambda d: mean_at_k(rewards(d))[0]) == pytest.approx(policy["b"])


def test_a_large_vote_agrees_with_simulated_draws() -> None:
    """64 answers, 16 drawn; 20,000 draws; 5 standard errors: one false alarm in two million."""
    generator = np.random.default_rng(0)
    votes = np.array([str(min(v, 12)) for v in generator.geometric(0.2, 64)])
    rewards = np.array([[float(vote in ("1", "3")) for vote in votes]])
    worth: dict[str | None, float] = {vote: float(vote in ("1", "3")) for vote in votes}
    simulated = [
        majority(tuple(generator.choice(votes, 16, replace=False)), worth) for _ in range(20_000)
    ]
    error = np.std(simulated) / len(simulated) ** 0.5
    assert abs(maj_at_k(rewards, [list(votes)], 16)[0] - np.mean(simulated)) < 5 * error


def test_answers_without_reward_count_for_nothing() -> None:
    rewards = np.array([[1.0, NAN, 0.0, NAN], [1.0, 1.0, 1.0, 0.0], [NAN] * 4])
    votes = [["a", "b", "b", "b"], ["a"] * 3 + ["b"], [None] * 4]
    assert mean_at_k(rewards).tolist() == pytest.approx([0.5, 0.75, NAN], nan_ok=True)
    assert pass_at_k(rewards, 2).tolist() == pytest.approx([1.0, 1.0, NAN], nan_ok=True)
    assert worst_at_k(rewards, 2).tolist() == pytest.approx([0.0, 0.5, NAN], nan_ok=True)
    assert maj_at_k(rewards, votes, 2).tolist() == pytest.approx([0.5, 0.75, NAN], nan_ok=True)
    assert pass_at_k(rewards, 3).tolist() == pytest.approx([NAN, 1.0, NAN], nan_ok=True)


def test_solved_is_what_the_caller_says() -> None:
    rewards = np.array([[0.4, 0.6, 0.9, 1.0]])
    assert pass_at_k(rewards, 1)[0] == 0.25
    assert pass_at_k(rewards, 1, solved_at=0.6)[0] == 0.75


# --- intervals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(0.6, 1.4), (0.2, 1.8), (1.8, 0.2)])
def test_the_interval_covers_as_often_as_it_says(a: float, b: float) -> None:
    """400 evaluations of 128 problems of beta-distributed difficulty, 8 answers each. At a true
    coverage of 95%, fewer than 365 or more than 395 hits come once in 1,700 trials (binomial)."""
    generator = np.random.default_rng(3)
    hits = 0
    for seed in range(400):
        rewards = generator.random((128, 8)) < generator.beta(a, b, (128, 1))
        estimates = mean_at_k(rewards.astype(float))
        low, high = bootstrap_interval(estimates, resamples=1000, seed=seed)
        hits += low <= a / (a + b) <= high
    assert 365 <= hits <= 395


def test_where_all_problems_agree_the_interval_still_says_what_is_not_known() -> None:
    """The exact bound: had the chance of a success been larger, zero of 20 were too unlikely."""
    low, high = bootstrap_interval(np.zeros(20))
    assert (low, high) == (0.0, pytest.approx(scipy.stats.beta.ppf(0.975, 1, 20)))
    low, high = bootstrap_interval(np.ones(20))
    assert (low, high) == (pytest.approx(scipy.stats.beta.ppf(0.025, 20, 1)), 1.0)
    # that all are one half does not say that all others are: a twentieth may well be worth 0 or 1
    assert bootstrap_interval(np.full(20, 0.5)) == pytest.approx(
        (0.5 * 0.025 ** (1 / 20), 1 - 0.5 * 0.025 ** (1 / 20))
    )
    assert bootstrap_interval(np.ones(1)) == pytest.approx((0.025, 1.0))
    assert bootstrap_interval(np.full(1, 0.5)) == pytest.approx((0.0125, 0.9875))


def test_the_interval_is_the_same_for_the_same_seed_only() -> None:
    estimates = np.random.default_rng(0).random(50)
    assert bootstrap_interval(estimates, seed=1) == bootstrap_interval(estimates, seed=1)
    assert bootstrap_interval(estimates, seed=1) != bootstrap_interval(estimates, seed=2)


@pytest.mark.parametrize("estimates", [[], [NAN], [0.0, NAN], [0.5, float("inf")], [0.5, 1.5]])
def test_no_interval_is_made_up(estimates: list[float]) -> None:
    with pytest.raises(ValueError, match=r"an estimate or more, and no NaN|beyond \(0.0, 1.0\)"):
        bootstrap_interval(np.array(estimates))


@pytest.mark.parametrize("solved", [0, 1, 3, 19, 20])
def test_of_problems_that_are_solved_or_not_the_interval_is_clopper_and_pearson_s(
    solved: int,
) -> None:
    """Also in another range than [0, 1], which only stretches it."""
    share = np.array([1.0] * solved + [0.0] * (20 - solved))
    want = tuple(scipy.stats.binomtest(solved, 20).proportion_ci(0.9, method="exact"))
    assert bootstrap_interval(share, confidence=0.9) == pytest.approx(want)
    got = bootstrap_interval(7 * share - 5, confidence=0.9, bounds=(-5.0, 2.0))
    assert got == pytest.approx([7 * end - 5 for end in want])


@pytest.mark.parametrize(
    ("problems", "n", "rate", "alike", "scale"),
    [
        (1, 8, 0.5, 1.0, (0, 1)),
        (3, 4, 0.3, 1.0, (0, 1)),
        (5, 8, 0.05, 1.0, (0, 1)),
        (5, 8, 0.7, 20.0, (-1, 1)),
        (12, 1, 0.03, 1.0, (0, 1)),
        (12, 8, 0.5, 0.05, (0, 10)),  # a problem's answers are nearly all right or all wrong
        (22, 8, 0.95, 0.3, (0, 1)),
        (22, 2, 0.01, 1.0, (-3, -1)),
        (64, 8, 0.02, 0.05, (0, 1)),
        (64, 8, 0.2, 20.0, (0, 1)),
    ],
)
def test_of_few_or_extreme_problems_the_interval_covers_at_least_what_it_says(
    problems: int, n: int, rate: float, alike: float, scale: tuple[float, float]
) -> None:
    """300 evaluations; a problem's own rate is drawn from Beta(rate * alike, (1 - rate) * alike).
    Were the coverage 95 %, one of these ten tests would fail once in 10,000 times."""
    generator = np.random.default_rng(problems)
    low, high = scale
    hits = 0
    for seed in range(300):
        rates = generator.beta(rate * alike, (1 - rate) * alike, (problems, 1))
        rewards = low + (high - low) * (generator.random((problems, n)) < rates)
        ends = bootstrap_interval(mean_at_k(rewards), bounds=scale, resamples=1000, seed=seed)
        assert low <= ends[0] < ends[1] <= high
        hits += ends[0] <= low + (high - low) * rate <= ends[1]
    assert hits >= scipy.stats.binom.ppf(1e-5, 300, 0.95)
