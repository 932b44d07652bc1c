"""The table of exams: what each model scored, and the share of its teacher's score that it has."""

from collections.abc import Mapping
from typing import Any

from distill.tables import (
    NOT_MEASURED,
    Cell,
    Format,
    Row,
    estimate_cell,
    measured_models,
    percent,
    three,
)

QUESTIONS = 'questions'


def exam_rows(models: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Lays out what models scored in exams, and the share of the teacher's score that they have.

    Args:
        models: for each model, in the order of the columns, its exams as the summary has them.

    Returns:
        A row for each exam, and one below it where a share was measured.
    """
    rows = []
    for name in dict.fromkeys(name for exams in models.values() for name in exams):
        taken = [exams.get(name) for exams in models.values()]
        count = next(exam['questions'] for exam in taken if exam is not None)
        shares = tuple(_score((exam or {}).get('retained'), percent) for exam in taken)
        form = percent if all(map(_is_share, taken)) else three
        scores = tuple(_score(exam, form) for exam in taken)
        rows.append(Row(name, f'{count:,} {QUESTIONS}', scores))
        if any(cell.text != NOT_MEASURED for cell in shares):
            rows.append(Row(name, "of the teacher's", shares))
    return rows


def _is_share(exam: Mapping[str, Any] | None) -> bool:
    return exam is None or (exam.get('higher_is_better', False) and 0 <= exam['value'] <= 1)


def _score(exam: Mapping[str, Any] | None, form: Format) -> Cell:
    if exam is None:
        return Cell(NOT_MEASURED)
    cell = estimate_cell(exam, form)
    if 'standard_error' not in exam:
        return cell
    error = form(exam['standard_error']).removesuffix(' %')
    return Cell(cell.text, ', '.join(filter(None, [cell.interval, f'\u00b1{error}'])))


def exams_of(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the exams of every measured model, in the order of the table; {} without any."""
    found = {name: summary['models'][name].get('exams', {}) for name in measured_models(summary)}
    return found if any(found.values()) else {}
