"""Scores of an exam, with standard errors, and the share of a teacher's that a student retains."""

import dataclasses
from typing import Any

import numpy as np

from distill.statistics import Estimate, ratio

# Half the width of a 95 % interval, in standard errors.
_REACH = 1.959964


@dataclasses.dataclass(frozen=True)
class Exam:
    """What one model scored in one exam.

    Attributes:
        name: of the exam, and of its metric.
        value: the score.
        standard_error: of the score; None where it was not measured.
        questions: how many were asked.
        grades: of each question, where the score is their mean; else None.
        higher_is_better: whether a larger score is the better one; None where that is not known.
    """

    name: str
    value: float
    standard_error: float | None
    questions: int
    grades: np.ndarray | None = None
    higher_is_better: bool | None = True


def graded(name: str, grades: Any) -> Exam:
    """Makes the exam whose score is the mean of its grades, one for each question.

    Its standard error is `s / sqrt(n)`, with the sample standard deviation `s`.
    """
    grades = np.asarray(grades, np.float64)
    error = float(grades.std(ddof=1) / np.sqrt(len(grades))) if len(grades) > 1 else None
    return Exam(name, float(grades.mean()), error, len(grades), grades)


def estimate(exam: Exam, *, seed: int = 0) -> Estimate:
    """Estimates a score with a 95 % interval.

    Args:
        exam: of one model.
        seed: of the resampling.

    Returns:
        With grades, the percentile bootstrap over questions; without, 1.96 standard errors on
        either side; without those either, no interval.
    """
    if exam.grades is not None:
        return ratio(exam.grades, np.ones(exam.questions), seed=seed)
    return _normal(exam.value, exam.standard_error)


def retained(model: Exam, teacher: Exam) -> tuple[Estimate, float | None] | None:
    """Estimates which share of its teacher's score a model has.

        R = m / t,   Var(R) = Var(m - R t) / t^2

    to first order (the delta method). With grades of both the variance is that of the mean of
    `m_i - R t_i` over the questions, which both models answered; without them the scores are taken
    as independent, `Var(m) + R^2 Var(t)`, which is more than the truth where both find the same
    questions hard.

    Args:
        model: the student's or control's.
        teacher: in the same exam.

    Returns:
        The share, with an interval of 1.96 standard errors on either side, and its standard error;
        None where a share means nothing: the teacher scored nothing or less, or a larger score is
        not known to be better.

    Raises:
        ValueError: where the exams are not the same.
    """
    if (model.name, model.questions) != (teacher.name, teacher.questions):
        raise ValueError(f'not the same exam: {model.name} and {teacher.name}')
    if teacher.value <= 0 or not teacher.higher_is_better:
        return None
    share = model.value / teacher.value
    if model.standard_error is None or teacher.standard_error is None:
        return Estimate(share), None
    if model.grades is not None and teacher.grades is not None:
        gaps = model.grades - share * teacher.grades
        error = float(gaps.std(ddof=1) / np.sqrt(model.questions) / teacher.value)
    else:
        apart = np.hypot(model.standard_error, share * teacher.standard_error)
        error = float(apart / teacher.value)
    return _normal(share, error), error


def _normal(value: float, error: float | None) -> Estimate:
    if error is None:
        return Estimate(value)
    return Estimate(value, value - _REACH * error, value + _REACH * error)


def exam_summary(
    exams: dict[str, list[Exam]], *, seed: int = 0
) -> dict[str, dict[str, dict[str, Any]]]:
    """Lays the exams of several models out for the summary.

    Args:
        exams: of each model, in the same order; 'teacher' is who the others are compared with.
        seed: of the resampling.

    Returns:
        For each model and exam its `value`, `low`, `high`, `standard_error` and `questions`, its
        `higher_is_better`, and, but of the teacher, what it has `retained`; what was not measured
        is absent.
    """
    teachers = {exam.name: exam for exam in exams.get('teacher', ())}
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for who, taken in exams.items():
        rows[who] = {}
        for exam in taken:
            row: dict[str, Any] = _with_error(estimate(exam, seed=seed), exam.standard_error)
            row['questions'] = exam.questions
            if exam.higher_is_better is not None:
                row['higher_is_better'] = exam.higher_is_better
            if who != 'teacher' and exam.name in teachers:
                share = retained(exam, teachers[exam.name])
                row |= {} if share is None else {'retained': _with_error(*share)}
            rows[who][exam.name] = row
    return rows


def _with_error(estimated: Estimate, error: float | None) -> dict[str, float]:
    return estimated.to_dict() | ({} if error is None else {'standard_error': error})
