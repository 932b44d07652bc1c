"""Ratios of sums, and the bootstrap over documents around them."""

import numpy as np
import pytest

from distill.statistics import Estimate, bootstrap, paired_difference, paired_quotient, ratio


def percentile_interval(values, *, seed, resamples=2000, level=0.95):
    """An independent bootstrap: counts of each document, one resample at a time, sorted draws."""
    generator = np.random.default_rng(seed)
    n = len(values[0])
    draws = []
    for _ in range(resamples):
        counts = generator.multinomial(n, [1 / n] * n)
        numerator = sum(float(c) * float(x) for c, x in zip(counts, values[0], strict=True))
        denominator = sum(float(c) * float(x) for c, x in zip(counts, values[1], strict=True))
        draws.append(numerator / denominator)
    draws.sort()
    ends = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        place = share * (resamples - 1)
        below = int(place)
        rest = place - below
        ends.append(draws[below] + rest * (draws[below + 1] - draws[below]))
    return tuple(ends)


def test_a_ratio_divides_the_sums_and_does_not_average_the_ratios():
    # The mean of 2/1 and 4/9 would be 1.22.
    assert ratio(np.array([2.0, 4.0]), np.array([1.0, 9.0])).value == pytest.approx(6 / 10)


def test_the_interval_of_two_documents_spans_both():
    """Each document is drawn twice a quarter of the time, which is more than 2.5 %."""
    estimate = ratio(np.array([1.0, 3.0]), np.array([1.0, 1.0]))
    assert (estimate.low, estimate.value, estimate.high) == (1.0, 2.0, 3.0)


def test_a_narrow_level_gives_a_narrow_interval():
    """Half of the resamples of two documents hold each once, which is the middle 40 % and more."""
    estimate = ratio(np.array([1.0, 3.0]), np.array([1.0, 1.0]), level=0.4)
    assert (estimate.low, estimate.value, estimate.high) == (2.0, 2.0, 2.0)


def test_equal_documents_have_an_interval_without_width():
    estimate = ratio(np.full(7, 3.0), np.full(7, 4.0))
    np.testing.assert_allclose([estimate.low, estimate.value, estimate.high], 0.75, rtol=1e-12)
    # Documents of one ratio but of different sizes vary in nothing that the ratio sees.
    sizes = np.array([1.0, 10.0, 100.0])
    estimate = ratio(2 * sizes, sizes)
    np.testing.assert_allclose([estimate.low, estimate.value, estimate.high], 2, rtol=1e-12)


def test_the_bootstrap_equals_one_written_without_vectors():
    rng = np.random.default_rng(3)
    weights = rng.integers(1, 50, 9).astype(float)
    sums = weights * rng.uniform(1, 4, 9)
    estimate = ratio(sums, weights, seed=11)
    wanted = percentile_interval((sums, weights), seed=11)
    np.testing.assert_allclose((estimate.low, estimate.high), wanted, rtol=1e-12)
    assert estimate.value == pytest.approx(sums.sum() / weights.sum(), rel=1e-12)


def test_many_documents_give_the_interval_of_the_normal_law():
    """For a mean, the percentile interval tends to 1.96 standard errors on either side."""
    values = np.random.default_rng(5).normal(10, 2, 1000)
    estimate = bootstrap(lambda t: t[:, 0] / 1000, values[:, None], resamples=8000)
    error = values.std() / np.sqrt(1000)
    wanted = values.mean() + 1.96 * error * np.array([-1, 1])
    # The quantile of 8000 draws is itself uncertain by some hundredths of an error.
    np.testing.assert_allclose((estimate.low, estimate.high), wanted, atol=0.12 * error)


def test_resamples_drawn_in_blocks_are_those_drawn_at_once(monkeypatch):
    totals = np.random.default_rng(0).uniform(1, 2, (5, 2))

    def estimate():
        return bootstrap(lambda t: t[:, 0] / t[:, 1], totals, resamples=101, seed=4)

    whole = estimate()
    monkeypatch.setattr('distill.statistics._BLOCK_ELEMENTS', 35)
    in_blocks = estimate()
    np.testing.assert_allclose((in_blocks.low, in_blocks.high), (whole.low, whole.high), rtol=1e-12)


def test_the_seed_alone_decides_the_interval():
    rng = np.random.default_rng(1)
    sums, weights = rng.uniform(1, 9, 12), rng.uniform(1, 9, 12)
    assert ratio(sums, weights, seed=2) == ratio(sums, weights, seed=2)
    assert ratio(sums, weights, seed=2) != ratio(sums, weights, seed=3)
    assert ratio(sums, weights, seed=2).value == ratio(sums, weights, seed=3).value


def test_a_paired_difference_is_the_first_less_the_second():
    first, second, weights = np.array([5.0, 7.0]), np.array([2.0, 6.0]), np.array([1.0, 3.0])
    estimate = paired_difference(first, second, weights)
    # (12 - 8) / 4; by document (5 - 2) / 1 and (7 - 6) / 3.
    assert estimate.value == pytest.approx(1.0)
    assert estimate.low == pytest.approx(1 / 3)
    assert estimate.high == pytest.approx(3.0)
    swapped = paired_difference(second, first, weights)
    assert swapped.value == pytest.approx(-1.0)
    assert (swapped.low, swapped.high) == pytest.approx((-3.0, -1 / 3))


def test_pairing_removes_what_the_documents_have_in_common():
    """Two models a constant apart on documents of very different difficulty."""
    first = np.random.default_rng(0).uniform(0, 100, 30)
    difference = paired_difference(first + 0.5, first, np.ones(30))
    np.testing.assert_allclose([difference.low, difference.value, difference.high], 0.5, rtol=1e-9)
    alone = ratio(first, np.ones(30))
    assert alone.high - alone.low > 5


def test_a_paired_difference_equals_the_one_written_without_vectors():
    rng = np.random.default_rng(8)
    first, second, weights = rng.uniform(1, 9, (3, 7))
    estimate = paired_difference(first, second, weights, seed=6)
    wanted = percentile_interval((first - second, weights), seed=6)
    np.testing.assert_allclose((estimate.low, estimate.high), wanted, rtol=1e-9)


def test_a_paired_quotient_divides_the_first_by_the_second():
    estimate = paired_quotient(np.array([3.0, 1.0]), np.array([4.0, 4.0]), np.array([5.0, 9.0]))
    assert estimate == Estimate(0.5, 0.25, 0.75)


def test_documents_that_hold_nothing_are_left_out():
    """A document without a predicted token can neither move nor widen an estimate."""
    sums, weights = np.array([1.0, 3.0, 5.0]), np.array([1.0, 2.0, 2.0])
    padded = np.insert(sums, 1, 0.0), np.insert(weights, 1, 0.0)
    assert ratio(*padded) == ratio(sums, weights)


def test_one_document_has_a_value_and_no_interval():
    estimate = ratio(np.array([3.0]), np.array([2.0]))
    assert estimate == Estimate(1.5, None, None)
    assert estimate.to_dict() == {'value': 1.5}


def test_an_undefined_resample_leaves_the_interval_out():
    """The second document alone has weight: a resample of the first twice divides by zero."""
    assert ratio(np.array([1.0, 3.0]), np.array([0.0, 2.0])) == Estimate(2.0, None, None)


def test_an_estimate_becomes_a_dict_of_what_was_measured():
    assert Estimate(1.0, 0.5, 2.0).to_dict() == {'value': 1.0, 'low': 0.5, 'high': 2.0}


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(ValueError, match='one or more'):
        ratio(np.array([]), np.array([]))
    with pytest.raises(ValueError, match='one or more'):
        ratio(np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match='statistic of all documents is inf'):
        ratio(np.array([1.0, 2.0]), np.zeros(2))
    with pytest.raises(ValueError, match='one number for each document'):
        ratio(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match='one number for each document'):
        paired_difference(np.ones((2, 2)), np.ones((2, 2)), np.ones((2, 2)))
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError, match='level must lie'):
            ratio(np.ones(2), np.ones(2), level=level)
