"""pass@k of a set of problems, and how far its value can be trusted.

Problems are a random sample of a level; completions are a random sample of what a model answers to a problem. Intervals
are for the mean over all problems of that kind, so both sources of chance count.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from hf_delta.errors import InputError


_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> np.ndarray:
    """Unbiased estimate of the chance that at least one of `k` completions is correct.

    `1 - C(n - c, k) / C(n, k) = 1 - prod_{j<k} (n - c - j) / (n - j)`, the share of the subsets of `k` of the `n`
    completions that hold a correct one (Chen et al. 2021, arXiv 2107.03374, eq. 1).

    Args:
        n (array of `int`, `(P,)` or scalar): completions per problem.
        c (array of `int`, `(P,)`): correct ones among them.
        k (`int`): completions allowed.

    Returns:
        `np.ndarray` of shape `(P,)`.

    Raises:
        InputError: if `k` is below 1 or above some `n`, or some `c` is not in `[0, n]`.
    """
    n, c = np.broadcast_arrays(n, c)
    if k < 1 or (n < k).any():
        raise InputError(
            f"pass@{k} needs k between 1 and the number of samples per problem, which is {n.min()}: lower k or draw more."
        )
    if (c < 0).any() or (c > n).any():
        raise InputError("pass@k: the number of correct samples must lie between 0 and the number of samples.")
    wrong = np.ones(c.shape)
    for j in range(k):
        # Passes through 0 and stays there when fewer than k completions are wrong.
        wrong *= (n - c - j) / (n - j)
    return 1 - wrong


def mean_estimate(values: ArrayLike) -> Estimate:
    """Mean of per-problem values in `[0, 1]` with Wilson's interval at the effective number of problems.

    `n_eff = p (1 - p) / var(p)` with `p` the mean and `var(p)` the variance between problems divided by their number
    `P`, times `(z / t_{P-1})^2` because that variance is itself estimated (Korn and Graubard 1998). When all values are
    equal, `n_eff = P`: 0 of 24 problems solved still leaves an upper bound of 0.14.

    Args:
        values (array of `float`, `(P,)`): e.g. what [`pass_at_k`] returns.
    """
    values = np.asarray(values, dtype=float)
    mean, effective = float(values.mean()), float(len(values))
    if np.ptp(values) > 0:
        variance = values.var(ddof=1) / len(values)
        effective = mean * (1 - mean) / variance * (_Z / _student_t(len(values) - 1)) ** 2
    return _wilson(mean, effective)


def unbounded_mean_estimate(values: ArrayLike) -> Estimate:
    """Mean of values of any size with Student's interval, `m +- t_{P-1} s / sqrt(P)`; infinite for a single value.

    Args:
        values (array of `float`, `(P,)`): for instance lengths, or differences of a pair.
    """
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = _student_t(len(values) - 1) * float(values.std(ddof=1)) / len(values) ** 0.5
    return Estimate(mean, mean - half, mean + half)


def difference_estimate(before: ArrayLike, after: ArrayLike) -> Estimate:
    """Mean of `after - before` over the same problems, with an interval that uses the pairing.

    Newcombe's interval for paired proportions (1998, Statist. Med. 17, 2635, method 10), with the Wilson intervals of
    [`mean_estimate`] and the correlation between problems. Unlike `mean +- t * standard error` it keeps a width where no
    problem changed, as on a level that is at 0 before and after.

    Args:
        before (array of `float`, `(P,)`): per-problem values in `[0, 1]`.
        after (array of `float`, `(P,)`): those of the same problems in the same order.
    """
    before, after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    old, new = mean_estimate(before), mean_estimate(after)
    correlation = 0.0
    if np.ptp(before) > 0 and np.ptp(after) > 0:
        correlation = float(np.corrcoef(before, after)[0, 1])
    difference = new.mean - old.mean
    return Estimate(
        difference,
        difference - _hypotenuse(new.mean - new.low, old.high - old.mean, correlation),
        difference + _hypotenuse(new.high - new.mean, old.mean - old.low, correlation),
    )


def weighted_estimate(estimates: Sequence[Estimate], weights: ArrayLike) -> Estimate:
    """Weighted mean of independent estimates, such as those of the levels.

    The lower limit is `m - sqrt(sum_i w_i^2 (m_i - low_i)^2)`, the upper one likewise (Zou and Donner 2008, Statist.
    Med. 27, 1693); `w` are the weights divided by their sum.

    Args:
        estimates (sequence of [`Estimate`], of length L): e.g. one per level.
        weights (array of `float`, `(L,)`): at least 0, not all 0.
    """
    mean, low, high = np.array([(e.mean, e.low, e.high) for e in estimates]).T
    share = np.asarray(weights, dtype=float)
    share = share / share.sum()
    total = float(share @ mean)
    return Estimate(
        total,
        total - float(np.linalg.norm(share * (mean - low))),
        total + float(np.linalg.norm(share * (high - mean))),
    )


def _wilson(p: float, n: float) -> Estimate:
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * (p * (1 - p) / n + _Z**2 / (4 * n**2)) ** 0.5
    # The limits are 0 at p = 0 and 1 at p = 1 in exact arithmetic.
    return Estimate(p, min(max(centre - half, 0.0), p), max(min(centre + half, 1.0), p))


def _hypotenuse(a: float, b: float, correlation: float) -> float:
    # Rounding can take a perfect correlation of equal sides a hair below 0.
    return max(a * a - 2 * correlation * a * b + b * b, 0.0) ** 0.5


def _student_t(freedom: int) -> float:
    """97.5 % quantile of Student's t from its series in 1/freedom around the normal (Abramowitz and Stegun 26.7.5)."""
    if freedom == 1:
        # The series is 11 % low here and at most 1 % low from 2 on.
        return 12.7062
    z = _Z
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
