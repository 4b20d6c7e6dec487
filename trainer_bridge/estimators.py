"""What n answers to each problem say of k draws: pass@k, worst@k, maj@k and mean@k, with intervals.

Functions of arrays [P, n]: P problems, n answers each. `rewards` are float64, and NaN where an
answer has no reward since something failed: such answers count for nothing, and a problem with
fewer than k scored answers has no estimate at k (NaN). Every estimate is the exact mean over all
subsets of k scored answers, and so unbiased for k independent draws from the policy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from math import comb, nan

import numpy as np
import scipy.stats
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def mean_at_k(rewards: Floats) -> Floats:
    """Mean reward of each problem's answers: [P]. The expectation is the same for every k."""
    return np.array([row.mean() if len(row) else nan for row in _scored(rewards)])


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
    # rounded once, at the end: of rewards that are all 1, the sum is 1 and not a bit less
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
    total = comb(len(abstained), k) * (sum(abstained) / len(abstained)) if abstained else 0.0
    for top in range(1, min(k, max(map(len, candidates), default=0)) + 1):
        # Draws in which no candidate has more than `top` votes, by (votes drawn, candidates with
        # `top` of them): how many, and the worth of those candidates summed over these draws.
        counts, worths = {(0, 0): 1}, {(0, 0): 0.0}
        for rewards in candidates:
            worth = sum(rewards) / len(rewards)
            more_counts: defaultdict[tuple[int, int], int] = defaultdict(int)
            more_worths: defaultdict[tuple[int, int], float] = defaultdict(float)
            for (drawn, tied), count in counts.items():
                for votes in range(min(len(rewards), top, k - drawn) + 1):
                    ways, wins = comb(len(rewards), votes), votes == top
                    state = drawn + votes, tied + wins
                    more_counts[state] += ways * count
                    more_worths[state] += ways * (worths[drawn, tied] + wins * worth * count)
            counts, worths = dict(more_counts), dict(more_worths)
        for (drawn, tied), value in worths.items():
            if tied:
                total += value / tied * comb(len(abstained), k - drawn)
    return total / comb(n, k)


def _scored(rewards: Floats) -> list[Floats]:
    return [row[~np.isnan(row)] for row in rewards]


def bootstrap_interval(
    estimates: Floats, *, confidence: float = 0.95, resamples: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """Interval for the mean of `estimates` [P] over problems like these, by resampling problems.

    Bias-corrected and accelerated bootstrap (BCa; Efron 1987, DOI 10.1080/01621459.1987.10478410).
    Where all are 0, or all 1, resampling shows nothing: then the exact bound for a quantity in
    [0, 1], as Clopper and Pearson's. Raises ValueError for fewer than two estimates, or NaN.
    """
    count = len(estimates)
    if count < 2 or np.isnan(estimates).any():
        raise ValueError("an interval needs two estimates or more, and no NaN")
    tail = (1.0 - confidence) / 2.0
    mean = float(estimates.mean())
    if np.ptp(estimates) == 0.0:
        bound = tail ** (1.0 / count)
        return {0.0: (0.0, 1.0 - bound), 1.0: (bound, 1.0)}.get(mean, (mean, mean))
    interval = scipy.stats.bootstrap(
        (estimates,),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)
