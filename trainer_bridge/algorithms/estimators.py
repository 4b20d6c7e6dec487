"""What n answers to each problem say of k draws: pass@k, worst@k, maj@k and mean@k, with intervals.

Functions of arrays [P, n]: P problems, n answers each. `rewards` are float64, and NaN where an
answer has no reward since something failed: such answers count for nothing, and a problem with
fewer than k scored answers has no estimate at k (NaN). Every estimate is the exact mean over all
subsets of k scored answers, and so unbiased for k independent draws from the policy. It is counted
in integers and rounded once, at the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import comb, lcm, nan

import numpy as np
import scipy.stats
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def mean_at_k(rewards: Floats) -> Floats:
    """Mean reward of each problem's answers: [P]. The expectation is the same for every k."""
    return np.array([_mean(row.tolist()) for row in _scored(rewards)])


def _mean(rewards: Sequence[float]) -> float:
    return float(_exact_mean(rewards)) if rewards else nan


def _exact_mean(rewards: Sequence[float]) -> Fraction:
    """0 of none."""
    return sum(map(Fraction, rewards), Fraction(0)) / max(1, len(rewards))


def pass_at_k(rewards: Floats, k: int, *, solved_at: float = 1.0) -> Floats:
    """Chance that at least one of k answers solves the problem (reward >= solved_at): [P].

    1 - C(n - c, k) / C(n, k), for c of n answers that solve it (arXiv 2107.03374, equation 1).
    """
    return np.array([_pass(row >= solved_at, k) for row in _scored(rewards)])


def _pass(solved: NDArray[np.bool_], k: int) -> float:
    n, c = len(solved), int(solved.sum())
    return (comb(n, k) - comb(n - c, k)) / comb(n, k) if n >= k else nan


def worst_at_k(rewards: Floats, k: int) -> Floats:
    """Expected lowest reward of k answers: [P]. Of rewards 0 and 1: chance that all k are 1.

    sum_i r_i C(n - 1 - i, k - 1) / C(n, k) over the rewards in ascending order, i = 0 ... n - 1.
    """
    return np.array([_worst(np.sort(row), k) for row in _scored(rewards)])


def _worst(ascending: Floats, k: int) -> float:
    n = len(ascending)
    if n < k:
        return nan
    terms = (Fraction(float(r)) * comb(n - 1 - i, k - 1) for i, r in enumerate(ascending))
    return float(sum(terms, Fraction(0)) / comb(n, k))


def maj_at_k(rewards: Floats, votes: Sequence[Sequence[str | None]], k: int) -> Floats:
    """Expected reward of the most frequent vote among k answers: [P].

    votes: [P][n], the final answer that each answer gives. Equal votes are one candidate, worth the
    mean reward of its answers. Of candidates that tie, each is chosen with the same chance. None
    abstains; where all k abstain, the reward is the abstainers' mean.
    """
    estimates = []
    for row, texts in zip(rewards, votes, strict=True):
        candidates: defaultdict[str | None, list[float]] = defaultdict(list)
        for reward, text in zip(row, texts, strict=True):
            if not np.isnan(reward):
                candidates[text].append(float(reward))
        abstained = candidates.pop(None, [])
        estimates.append(_majority(list(candidates.values()), abstained, k))
    return np.array(estimates)


def _majority(candidates: list[list[float]], abstained: list[float], k: int) -> float:
    """Counts, for every number of votes `top` that can win, the draws it wins with."""
    n = len(abstained) + sum(map(len, candidates))
    if n < k:
        return nan
    sizes = [len(rewards) for rewards in candidates]
    means = [_exact_mean(rewards) for rewards in candidates]
    unit = lcm(*(mean.denominator for mean in means))
    worth_of = [int(mean * unit) for mean in means]
    total = comb(len(abstained), k) * _exact_mean(abstained)
    shared: defaultdict[int, int] = defaultdict(int)  # worth by the number of winners that share it
    for top in range(1, min(k, max(sizes, default=0)) + 1):
        # Draws in which no candidate has more than `top` votes, by (votes drawn, candidates with
        # `top` of them): how many, and the worth of those candidates summed over these draws.
        counts, worths = {(0, 0): 1}, {(0, 0): 0}
        for size, worth in zip(sizes, worth_of, strict=True):
            more_counts: defaultdict[tuple[int, int], int] = defaultdict(int)
            more_worths: defaultdict[tuple[int, int], int] = defaultdict(int)
            for (drawn, tied), count in counts.items():
                for votes in range(min(size, top, k - drawn) + 1):
                    ways, wins = comb(size, votes), votes == top
                    state = drawn + votes, tied + wins
                    more_counts[state] += ways * count
                    more_worths[state] += ways * (worths[drawn, tied] + wins * worth * count)
            counts, worths = dict(more_counts), dict(more_worths)
        for (drawn, tied), value in worths.items():
            if tied:
                shared[tied] += value * comb(len(abstained), k - drawn)
    total += sum((Fraction(worth, tied * unit) for tied, worth in shared.items()), Fraction(0))
    return float(total / comb(n, k))


def _scored(rewards: Floats) -> list[Floats]:
    return [row[~np.isnan(row)] for row in rewards]


def bootstrap_interval(
    estimates: Floats,
    *,
    confidence: float = 0.95,
    bounds: tuple[float, float] = (0.0, 1.0),
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval for the mean of `estimates` [P] over problems like these; a problem is one draw,
    however many answers it has.

    bounds: of what an estimate can be. For the lower end, weights from a flat Dirichlet
    distribution are drawn for the estimates and for one more at the lower bound; the end is the
    quantile of the weighted means; likewise above (Learned-Miller and Thomas, arXiv 1905.06208).
    Where all estimates are at the bounds, that is Clopper and Pearson's interval, and exact. It
    has a width also where all are equal, or there is one. Raises ValueError for none, for NaN, and
    for estimates beyond the bounds.
    """
    low, high = bounds
    if not len(estimates) or not np.isfinite(estimates).all():
        raise ValueError("an interval needs an estimate or more, and no NaN")
    if not low <= estimates.min() <= estimates.max() <= high:
        raise ValueError(f"estimates from {estimates.min()} to {estimates.max()} beyond {bounds}")
    if low == high:
        return low, high
    share, tail = (estimates - low) / (high - low), (1.0 - confidence) / 2.0
    generator = np.random.default_rng(seed)
    lowest = _lower_end(share, tail, resamples, generator)
    highest = 1.0 - _lower_end(1.0 - share, tail, resamples, generator)
    mean = float(share.mean())
    lowest, highest = min(lowest, mean), max(highest, mean)
    return low + lowest * (high - low), min(high, low + highest * (high - low))


def _lower_end(share: Floats, tail: float, resamples: int, generator: np.random.Generator) -> float:
    """Of values in [0, 1]. Equal ones share a weight, which is drawn at once."""
    values, counts = np.unique(share[share > 0.0], return_counts=True)
    zeros = len(share) - counts.sum() + 1  # with the added one
    if len(values) == 0:
        return 0.0
    if len(values) == 1:
        return float(values[0] * scipy.stats.beta.ppf(tail, counts[0], zeros))
    means = []
    for size in _pieces(resamples, 1 + 1_000_000 // len(values)):
        weights = generator.standard_gamma(counts, (size, len(values)))
        others = generator.standard_gamma(zeros, size)
        means.append(weights @ values / (weights.sum(axis=1) + others))
    return float(np.quantile(np.concatenate(means), tail))


def _pieces(total: int, most: int) -> Iterator[int]:
    while total > 0:
        yield min(most, total)
        total -= most
