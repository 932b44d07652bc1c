"""A summary's tables as plain text, for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from distill.exam_table import QUESTIONS, exam_rows, exams_of
from distill.quantised_table import quantised_columns, quantised_rows
from distill.tables import NOT_MEASURED, Row, measured_models, student_start, table_rows


def terminal_table(summary: Mapping[str, Any]) -> str:
    """Renders the table of models as aligned plain text.

    Args:
        summary: of the schema of `summary.json`.

    Returns:
        Lines without a trailing newline; numbers right-aligned, intervals in brackets.
    """
    names = measured_models(summary)
    text = aligned(names, [*table_rows(summary), *exam_rows(exams_of(summary))])
    text.extend(filter(None, [student_start(summary)]))
    if columns := quantised_columns(summary):
        text += ['', *aligned(columns, quantised_rows(summary))]
    return '\n'.join(text)


def aligned(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Aligns rows under the names of their columns as lines of plain text, with a legend."""
    body = []
    for row in rows:
        label = f'{row.label}, {row.unit}' if row.unit else row.label
        cells = [f'{c.text} [{c.interval}]' if c.interval else c.text for c in row.cells]
        body.append([label, *cells])
    lines = [['', *names], *body]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for label, *cells in lines:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        text.append('  '.join([label.ljust(widths[0]), *aligned]).rstrip())
    text.insert(1, '-' * max(map(len, text)))
    if any(cell == NOT_MEASURED for line in body for cell in line):
        text.append(f'{NOT_MEASURED} not measured')
    if any('[' in cell for line in body for cell in line):
        exams = any(row.unit.endswith(QUESTIONS) for row in rows)
        of = ', or the questions of an exam' if exams else ''
        text.append(f'[ ] 95 % bootstrap interval over held-out documents{of}')
    if any('\u00b1' in cell for line in body for cell in line):
        text.append('\u00b1 standard error')
    return text
