"""Comparisons of variants over seeds, by hand."""

import pytest

from distill.comparison import compare_variants, comparison_picture, comparison_table
from distill.statistics import t_interval


def summary(student: float, control: float | None = None) -> dict:
    models = {'student': {'bits_per_byte': {'value': student, 'low': 0.0, 'high': 9.0}}}
    if control is not None:
        models['control'] = {'bits_per_byte': {'value': control}}
    return {'models': models}


RUNS = {
    'plain': [summary(2.0, 3.0), summary(3.0, 3.0), summary(4.0)],
    'new': [summary(1.0), summary(2.5), summary(2.5)],
}


def test_t_interval_by_hand():
    # Mean 2, s = 1, t of two degrees of freedom 4.302653.
    estimate = t_interval([1.0, 2.0, 3.0])
    assert estimate.value == 2.0
    assert estimate.high == pytest.approx(2 + 4.302653 / 3**0.5, rel=1e-6)
    assert estimate.low == pytest.approx(2 - 4.302653 / 3**0.5, rel=1e-6)
    # At 90 % the quantile is 2.919986.
    assert t_interval([1.0, 2.0, 3.0], level=0.9).high == pytest.approx(2 + 2.919986 / 3**0.5)
    assert t_interval([5.0]).to_dict() == {'value': 5.0}
    with pytest.raises(ValueError, match='one or more'):
        t_interval([])


def test_differences_are_of_the_same_seed():
    compared = compare_variants(RUNS, 'plain')
    assert compared['plain']['models']['student']['bits_per_byte']['value'] == 3.0
    difference = compared['new']['difference']['student']['bits_per_byte']
    # -1, -0.5 and -1.5: s = 0.5.
    assert difference['seeds'] == [-1.0, -0.5, -1.5]
    assert difference['value'] == -1.0
    assert difference['low'] == pytest.approx(-1 - 4.302653 * 0.5 / 3**0.5, rel=1e-6)
    # Not every seed has a control: none is reported. The baseline differs from itself by nothing.
    assert compared['plain']['models']['control'] == {}
    assert compared['plain']['difference']['student'] == {}


def test_the_table_letter_by_letter():
    rows = comparison_table(compare_variants(RUNS, 'plain'), 'plain').splitlines()
    assert rows[0] == '| variant | model | bits per byte | more than plain |'
    assert rows[1] == '|---|---|---:|---:|'
    assert rows[2] == '| plain | student | 3.000 (0.516 to 5.484) |  |'
    assert rows[3] == '| new | student | 2.000 (-0.151 to 4.151) | -1.000 (-2.242 to +0.242) |'


def test_the_table_has_the_columns_that_some_model_has():
    one, other = summary(2.0), summary(1.0)
    one['models']['student'] |= {
        'calibration_error': {'value': 0.25},
        'top1_agreement': {'value': 0.5},
    }
    other['models']['student']['calibration_error'] = {'value': 0.125}
    rows = comparison_table(compare_variants({'x': [one], 'y': [other]}, 'x'), 'x').splitlines()
    assert rows[0] == (
        '| variant | model | bits per byte | more than x | agreement | calibration error |'
    )
    assert rows[2] == '| x | student | 2.000 |  | 50.0 % | 0.250 |'
    assert rows[3] == '| y | student | 1.000 | -1.000 |  | 0.125 |'


def test_the_picture_has_a_line_for_each_variant_and_a_point_for_each_seed():
    rows = [
        [{'step': 1, 'cross_entropy': 4.0}, {'step': 3, 'cross_entropy': 2.0}],
        [{'step': 1, 'cross_entropy': 6.0}, {'step': 3, 'cross_entropy': 4.0}],
        [{'step': 1, 'cross_entropy': 5.0}, {'step': 3, 'cross_entropy': 3.0}],
    ]
    compared = compare_variants(RUNS, 'plain')
    figure = comparison_picture(compared, dict.fromkeys(RUNS, rows), tokens_per_step=10)
    left, right = figure.axes
    assert [line.get_xydata().tolist() for line in left.lines] == [[[10, 5], [30, 3]]] * 2
    assert [text.get_text() for text in left.texts] == ['plain', 'new']
    assert [t.get_color() for t in left.texts] == [line.get_color() for line in left.lines]
    points = [line.get_ydata().tolist() for line in right.lines if len(line.get_ydata()) == 3]
    assert points == [[2.0, 3.0, 4.0], [1.0, 2.5, 2.5]]
    labels = [label.get_text() for label in right.get_xticklabels()]
    assert labels == ['plain\nstudent', 'new\nstudent']


def test_students_without_a_shared_measure_are_drawn_by_their_own_loss():
    has = [{'step': 1, 'cross_entropy': 4.0, 'loss': 2.0}, {'step': 2, 'gradient_norm': 1.0}]
    lacks = [{'step': 1, 'loss': 3.0}]
    curves = {'plain': [has] * 3, 'new': [lacks] * 3}
    figure = comparison_picture(compare_variants(RUNS, 'plain'), curves, tokens_per_step=10)
    left = figure.axes[0]
    assert [line.get_xydata().tolist() for line in left.lines] == [[[10, 2]], [[10, 3]]]
    assert left.get_ylabel() == 'Own loss of students, nats per token'
