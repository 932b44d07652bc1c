"""Calibration and agreement: bins worked by hand, and intervals over documents."""

import jax.numpy as jnp
import numpy as np
import pytest

from distill.calibration import (
    agreement_rows,
    binned_sums,
    bucket_range,
    calibration_error,
    confidence_bins,
    position_buckets,
    reliability_rows,
)
from distill.quality_pictures import agreement_by_position, drawn, reliability

# Two documents: in bin 2 (0.13 to 0.2) and bin 14 (0.93 to 1), with tokens, confidence and hits.
RELIABILITY = np.zeros((2, 15, 3))
RELIABILITY[0, 2] = (4, 0.8, 2)
RELIABILITY[0, 14] = (6, 5.7, 3)
RELIABILITY[1, 2] = (6, 1.2, 0)
RELIABILITY[1, 14] = (4, 3.8, 4)


def test_a_bin_is_open_below_and_closed_above():
    confidence = jnp.array([1e-9, 1 / 15, 0.0667, 0.5, 0.94, 1.0, 1.0000001])
    # 1/15 lies in the first bin, and what is a little more in the second; 0.5 * 15 = 7.5.
    np.testing.assert_array_equal(confidence_bins(confidence), [0, 0, 1, 7, 14, 14, 14])


def test_positions_fall_into_powers_of_two():
    positions = [0, 1, 2, 3, 4, 7, 8, 15, 16, 255, 256, 1 << 20]
    buckets = position_buckets(jnp.array(positions)).tolist()
    assert buckets == [0, 1, 2, 2, 3, 3, 4, 4, 5, 8, 9, 21]
    for bucket, position in zip(buckets, positions, strict=True):
        first, last = bucket_range(bucket)
        assert first <= position <= last
    assert [bucket_range(b) for b in range(4)] == [(0, 0), (1, 1), (2, 3), (4, 7)]


def test_binned_sums_leave_out_what_is_masked():
    bins = jnp.array([[0, 1, 1, 2], [2, 2, 0, 0]])
    values = jnp.array([[0.5, 0.25, 0.125, jnp.nan], [1.0, 2.0, 4.0, 8.0]])
    mask = jnp.array([[True, True, True, False], [True, True, False, True]])
    sums = binned_sums(bins, (jnp.ones_like(values), values), mask, 3)
    wanted = [[[1, 0.5], [2, 0.375], [0, 0]], [[1, 8], [0, 0], [2, 3]]]
    np.testing.assert_array_equal(sums, wanted)


def test_the_error_is_the_mean_gap():
    # Bin 2: 2 hits of 10 at a confidence of 0.2, no gap. Bin 14: 7 of 10 at 0.95, a gap of 2.5 of
    # 20 tokens.
    estimate = calibration_error(RELIABILITY)
    assert estimate.value == pytest.approx(2.5 / 20)
    # The documents by themselves: gaps 1.2 and 2.7 of 10 tokens; 1.2 and 0.2 of 10.
    assert estimate.low == pytest.approx(0.125)
    assert estimate.high == pytest.approx(0.39)


def test_a_model_that_says_what_it_knows_has_no_error():
    sure = np.zeros((3, 15, 3))
    sure[:, 14] = (5, 5, 5)
    assert calibration_error(sure).to_dict() == {'value': 0, 'low': 0, 'high': 0}
    wrong = sure.copy()
    wrong[:, 14, 2] = 0
    assert calibration_error(wrong).value == 1


def test_rows_describe_bins_that_have_tokens():
    low, high = reliability_rows(RELIABILITY)
    assert (low['tokens'], high['tokens']) == (10, 10)
    assert low['confidence'] == pytest.approx(0.2)
    assert low['accuracy'] == pytest.approx({'value': 0.2, 'low': 0.0, 'high': 0.5})
    assert high['confidence'] == pytest.approx(0.95)
    assert high['accuracy'] == pytest.approx({'value': 0.7, 'low': 0.5, 'high': 1.0})


def test_agreement_is_told_for_each_bucket():
    agree_at = np.zeros((2, 4, 2))
    agree_at[0, 0], agree_at[1, 0] = (1, 1), (1, 0)
    agree_at[0, 3], agree_at[1, 3] = (4, 1), (4, 3)
    first, last = agreement_rows(agree_at)
    assert first == {'from': 0, 'to': 0, 'tokens': 2, 'agreement': pytest.approx(interval(0.5))}
    assert (last['from'], last['to'], last['tokens']) == (4, 7, 8)
    assert last['agreement'] == pytest.approx({'value': 0.5, 'low': 0.25, 'high': 0.75})


def interval(value: float) -> dict[str, float]:
    """Of two documents, one of which has all and the other nothing."""
    return {'value': value, 'low': 0.0, 'high': 1.0}


def test_pictures_carry_the_numbers():
    agreement = [
        {'from': 0, 'to': 0, 'tokens': 2, 'agreement': {'value': 0.5, 'low': 0.25, 'high': 1.0}},
        {'from': 2, 'to': 3, 'tokens': 9, 'agreement': {'value': 0.75}},
    ]
    rows = reliability_rows(RELIABILITY)
    models = {
        'teacher': {'reliability': rows},
        'student': {'reliability': rows[:1], 'agreement_by_position': agreement},
    }
    summary = {'models': models}
    assert list(drawn(summary)) == ['reliability', 'agreement_by_position']
    (axes,) = reliability(summary).axes  # one bin is no line: the student has no panel
    assert axes.get_title(loc='left') == 'teacher'
    np.testing.assert_allclose(axes.lines[1].get_xydata(), [[0.2, 0.2], [0.95, 0.7]])
    bars = [segment[:, 1].tolist() for segment in axes.collections[0].get_segments()]
    np.testing.assert_allclose(bars, [[0, 0.5], [0.5, 1]], atol=1e-12)
    (axes,) = agreement_by_position(summary).axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0, 0.5], [1, 0.75]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ['0', '2\u20133']
    assert drawn({'models': {'student': {'reliability': rows[:1]}}}) == {}
