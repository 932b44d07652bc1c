"""Scores, their errors, and what a student retains, worked by hand."""

import numpy as np
import pytest

from distill.exams import Exam, estimate, exam_summary, graded, retained


def test_a_score_is_the_mean_of_its_grades():
    exam = graded('x', [True, False, True, True])
    assert (exam.value, exam.questions) == (0.75, 4)
    # Sample variance 0.25: 3/4 * 1/4 * 4/3.
    assert exam.standard_error == pytest.approx(0.25)
    assert estimate(exam).value == 0.75
    assert 0 <= estimate(exam).low < 0.75 < estimate(exam).high <= 1
    one = graded('x', [1.0])
    assert (one.standard_error, estimate(one).low) == (None, None)


def test_without_grades_an_interval_is_two_errors_wide():
    found = estimate(Exam('x', 3.0, 0.5, 10))
    assert (found.low, found.high) == pytest.approx((3 - 0.97998, 3 + 0.97998), abs=1e-4)
    assert estimate(Exam('x', 3.0, None, 10)).low is None


def test_what_is_retained_is_paired_by_question():
    teacher, student = graded('x', [1, 1, 1, 0]), graded('x', [1, 0, 1, 0])
    share, error = retained(student, teacher)
    assert share.value == pytest.approx(2 / 3)
    # Gaps 1/3, -2/3, 1/3, 0: sum 0, squares 6/9, variance 2/9; / 4, root, / 0.75.
    assert error == pytest.approx(np.sqrt(2 / 9 / 4) / 0.75)
    for reach in (share.high - share.value, share.value - share.low):
        assert reach == pytest.approx(1.959964 * error)
    same, error = retained(teacher, teacher)
    assert (same.value, error) == (1, 0)


def test_the_error_of_a_share_is_that_of_many_draws():
    """The delta method against a simulation: a student that has most of what its teacher has."""
    rng = np.random.default_rng(0)
    teacher = rng.random((4000, 400)) < 0.7
    student = (teacher & (rng.random(teacher.shape) < 0.8)) | (rng.random(teacher.shape) < 0.1)
    shares = student.mean(1) / teacher.mean(1)
    error = retained(graded('x', student[0]), graded('x', teacher[0]))[1]
    assert error == pytest.approx(shares.std(), rel=0.1)
    # Taken as independent, the error would be larger.
    apart = [
        Exam('x', g.value, g.standard_error, 400)
        for g in map(graded, 'xx', (student[0], teacher[0]))
    ]
    assert retained(*apart)[1] > 1.2 * error


def test_scores_without_grades_are_taken_as_independent():
    share, error = retained(Exam('x', 2.0, 0.3, 9), Exam('x', 4.0, 0.8, 9))
    # Var = 0.09 + 0.25 * 0.64 = 0.25; 0.5 / 4.
    assert (share.value, error) == pytest.approx((0.5, 0.125))
    assert share.high == pytest.approx(0.5 + 1.96 * 0.125, abs=1e-4)
    share, error = retained(Exam('x', 2.0, None, 9), Exam('x', 4.0, 0.8, 9))
    assert (share.value, share.low, error) == (0.5, None, None)


def test_where_a_share_means_nothing_there_is_none():
    assert retained(graded('x', [1, 0]), graded('x', [0, 0])) is None
    perplexity = Exam('x', 8.0, 0.1, 9, higher_is_better=False)
    assert retained(perplexity, perplexity) is None
    with pytest.raises(ValueError, match='not the same exam'):
        retained(graded('x', [1, 0]), graded('y', [1, 0]))
    with pytest.raises(ValueError, match='not the same exam'):
        retained(graded('x', [1, 0]), graded('x', [1, 0, 1]))


def test_rows_leave_out_what_was_not_measured():
    rows = exam_summary(
        {
            'teacher': [graded('a', [1, 1]), Exam('b', 8.0, None, 3, higher_is_better=None)],
            'student': [graded('a', [1, 0]), Exam('b', 9.0, 0.5, 3, higher_is_better=None)],
        }
    )
    assert rows['teacher']['a'] == {
        'value': 1.0,
        'low': 1.0,
        'high': 1.0,
        'standard_error': 0.0,
        'questions': 2,
        'higher_is_better': True,
    }
    assert rows['teacher']['b'] == {'value': 8.0, 'questions': 3}
    assert rows['student']['a']['retained'] == pytest.approx(
        {'value': 0.5, 'low': 0.5 - 0.979982, 'high': 0.5 + 0.979982, 'standard_error': 0.5}
    )
    assert sorted(rows['student']['b']) == ['high', 'low', 'questions', 'standard_error', 'value']
