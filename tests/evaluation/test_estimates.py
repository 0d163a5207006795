from itertools import combinations
from math import comb

import numpy as np
import pytest

from hf_delta.errors import InputError
from hf_delta.evaluation.estimates import (
    _student_t,
    difference_estimate,
    mean_estimate,
    pass_at_k,
    weighted_estimate,
)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_equals_the_share_of_subsets_with_a_correct_one(n):
    for c in range(n + 1):
        correct = [index < c for index in range(n)]
        for k in range(1, n + 1):
            subsets = list(combinations(correct, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(n, [c], k)[0] == pytest.approx(expected, abs=1e-12)


def test_k_of_one_is_the_mean():
    c = np.array([0, 3, 8, 5])
    np.testing.assert_allclose(pass_at_k(8, c, 1), c / 8, atol=1e-15)


def test_expectation_over_the_binomial_is_exactly_the_chance_of_a_pass():
    for n, k, p in [(8, 8, 0.1), (8, 3, 0.4), (20, 5, 0.03)]:
        c = np.arange(n + 1)
        chance = np.array([comb(n, i) * p**i * (1 - p) ** (n - i) for i in c])
        assert chance @ pass_at_k(n, c, k) == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_samples_per_problem_may_differ_and_large_numbers_do_not_overflow():
    values = pass_at_k([4, 100_000], [1, 1], 2)
    np.testing.assert_allclose(values, [0.5, 2e-5], rtol=1e-9)


@pytest.mark.parametrize(
    "n, c, k, message",
    [
        (4, [1], 5, "pass@5 needs k between 1 and .* is 4"),
        (4, [1], 0, "pass@0"),
        (4, [5], 1, "between 0 and"),
        (4, [-1], 1, "between 0 and"),
    ],
)
def test_impossible_counts_are_refused(n, c, k, message):
    with pytest.raises(InputError, match=message):
        pass_at_k(n, c, k)


def test_the_t_quantile_agrees_with_the_tables():
    for freedom, value in [
        (1, 12.7062),
        (2, 4.30265),
        (3, 3.18245),
        (5, 2.57058),
        (15, 2.13145),
        (23, 2.06866),
        (100, 1.98397),
    ]:
        assert _student_t(freedom) == pytest.approx(value, rel=0.01 if freedom < 4 else 2e-4)


def test_all_equal_values_give_the_textbook_wilson_interval():
    z2 = 1.959964**2
    nothing = mean_estimate(np.zeros(24))
    assert (nothing.mean, nothing.low) == (0.0, 0.0)
    assert nothing.high == pytest.approx(z2 / (24 + z2), abs=1e-6)
    everything = mean_estimate(np.ones(24))
    assert (everything.mean, everything.high) == (1.0, 1.0)
    assert everything.low == pytest.approx(24 / (24 + z2), abs=1e-6)
    # 5 of 10.
    half = mean_estimate(np.full(10, 0.5))
    assert (half.low, half.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_between_zero_and_one_problems_are_the_effective_sample():
    # With values 0 and 1 the unbiased variance makes n_eff = P - 1; 2.262157 is Student's t at 9 degrees of freedom.
    mixed = mean_estimate([1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    z2, n = 1.959964**2, 9 * (1.959964 / 2.262157) ** 2
    centre = (0.3 + z2 / (2 * n)) / (1 + z2 / n)
    half = z2**0.5 / (1 + z2 / n) * (0.3 * 0.7 / n + z2 / (4 * n * n)) ** 0.5
    assert (mixed.low, mixed.high) == pytest.approx((centre - half, centre + half), abs=1e-4)


def test_one_problem_says_next_to_nothing():
    one = mean_estimate([0.5])
    assert one.high - one.low > 0.8


def passes(rng, rates, k, n=8):
    return pass_at_k(n, rng.binomial(n, rates), k)


@pytest.mark.parametrize("problems", [16, 48])
@pytest.mark.parametrize("a, b, k", [(1, 1, 1), (0.3, 2, 8), (5, 1, 1), (8, 2, 1)])
def test_the_interval_covers_the_mean_over_all_problems(problems, a, b, k):
    rng = np.random.default_rng(0)
    truth = (1 - (1 - rng.beta(a, b, size=400_000)) ** k).mean()
    estimates = [mean_estimate(row) for row in passes(rng, rng.beta(a, b, size=(1500, problems)), k)]
    covered = np.mean([e.low <= truth <= e.high for e in estimates])
    # Standard error 0.006 at 0.95. One model of the skill of problems is not all: 0.93 is asked, not 0.95.
    assert 0.93 <= covered <= 0.985


def test_correlated_samples_of_a_problem_are_not_taken_for_evidence():
    # Every problem is always or never solved: 48 samples say no more than 6 problems do.
    always_or_never = mean_estimate(pass_at_k(8, [8, 8, 8, 0, 0, 0], 1))
    noisy = mean_estimate(pass_at_k(8, [4, 4, 4, 4, 5, 3], 1))
    assert always_or_never.mean == noisy.mean == 0.5
    assert always_or_never.high - always_or_never.low > 3 * (noisy.high - noisy.low)


@pytest.mark.parametrize("before, after", [((1, 1), (3, 1)), ((0.3, 2), (0.6, 2)), ((0.3, 2), (0.3, 2))])
def test_the_interval_of_the_paired_difference_covers_it(before, after):
    rng = np.random.default_rng(1)
    runs, problems = 1500, 24
    # The same ranks in both: a problem that is hard before is hard after.
    old, new = np.sort(rng.beta(*before, size=runs * problems)), np.sort(rng.beta(*after, size=runs * problems))
    shuffle = rng.permutation(runs * problems)
    old, new = old[shuffle].reshape(runs, problems), new[shuffle].reshape(runs, problems)
    pairs = zip(passes(rng, old, 1), passes(rng, new, 1))
    estimates = [difference_estimate(*pair) for pair in pairs]
    covered = np.mean([e.low <= new.mean() - old.mean() <= e.high for e in estimates])
    assert 0.93 <= covered <= 0.985


def test_pairing_narrows_the_difference_and_its_sign_is_after_minus_before():
    rates = np.linspace(0.05, 0.75, 24)
    paired = difference_estimate(rates, rates + 0.2)
    shuffled = difference_estimate(rates, np.roll(rates + 0.2, 12))
    assert paired.mean == pytest.approx(0.2) and shuffled.mean == pytest.approx(0.2)
    assert paired.low > 0
    assert paired.high - paired.low < 0.3 * (shuffled.high - shuffled.low)


def test_no_change_at_zero_is_not_certainty():
    nothing = difference_estimate(np.zeros(24), np.zeros(24))
    bound = mean_estimate(np.zeros(24)).high
    assert (nothing.mean, nothing.low, nothing.high) == pytest.approx((0.0, -bound, bound))


def test_weighted_mean_of_levels():
    easy, hard = mean_estimate(np.ones(10)), mean_estimate(np.zeros(30))
    equal = weighted_estimate([easy, hard], [1, 1])
    assert equal.mean == 0.5
    assert equal.high == pytest.approx(0.5 + hard.high / 2)
    assert equal.low == pytest.approx(0.5 - (1 - easy.low) / 2)
    assert weighted_estimate([easy, hard], [10, 30]).mean == 0.25
    assert weighted_estimate([easy], [3]) == easy


def test_the_interval_of_a_mean_over_levels_covers_it():
    rng = np.random.default_rng(2)
    skills = [(9, 1), (2, 2), (0.4, 4)]
    truth = np.mean([a / (a + b) for a, b in skills])
    draws = [passes(rng, rng.beta(a, b, size=(1500, 24)), 1) for a, b in skills]
    estimates = [weighted_estimate([mean_estimate(level) for level in run], [1, 1, 1]) for run in zip(*draws)]
    covered = np.mean([e.low <= truth <= e.high for e in estimates])
    assert 0.93 <= covered <= 0.985
