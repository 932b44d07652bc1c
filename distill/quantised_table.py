"""The table of a student whose matrices are quantised: what each kind saves, and what it loses."""

from collections.abc import Mapping
from typing import Any

from distill.metrics import format_quantity
from distill.tables import NOT_MEASURED, Cell, Format, Row, estimate_cell, three

_ESTIMATES: dict[str, tuple[str, str, Format]] = {
    'bits_per_byte': ('Bits per byte', 'lower is better', three),
    'kl_from_student': ('KL from student in floats', 'nats/token', '{:.5f}'.format),
}
_NUMBERS: dict[str, tuple[str, str]] = {
    'bytes_on_disk': ('Bytes', 'on disk'),
    'bytes_in_memory': ('Bytes', 'in memory'),
    'tokens_per_second': ('Tokens per second', 'decoding one text'),
}


def quantised_columns(summary: Mapping[str, Any]) -> list[str]:
    """Names the columns: kinds of weights; [] where none were measured."""
    return [
        f'{row["weights"]}, trained' if row['trained'] else row['weights']
        for row in summary.get('quantised', ())
    ]


def quantised_rows(summary: Mapping[str, Any]) -> list[Row]:
    """Lays out the table, a row for each number.

    Args:
        summary: of the schema of `summary.json`.
    """
    forms = summary.get('quantised', ())
    rows = [
        Row(label, unit, tuple(_number(form.get(name)) for form in forms))
        for name, (label, unit) in _NUMBERS.items()
    ]
    rows += [
        Row(label, unit, tuple(estimate_cell(form.get(name), write) for form in forms))
        for name, (label, unit, write) in _ESTIMATES.items()
    ]
    return [row for row in rows if any(cell.text != NOT_MEASURED for cell in row.cells)]


def _number(value: float | None) -> Cell:
    return Cell(NOT_MEASURED if value is None else format_quantity(value))
