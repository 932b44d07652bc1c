"""Tables in HTML, everything written in them escaped."""

from collections.abc import Sequence
from html import escape

from distill.tables import NOT_MEASURED, Cell, Row

ABSENT = '\u2013'


def columns(names: Sequence[str], rows: Sequence[Row]) -> str:
    """Renders a column for each name, and the rows with their units and intervals."""
    head = ''.join(f'<th scope="col" class="{name}">{escape(name)}</th>' for name in names)
    body = []
    for row in rows:
        unit = f'<small>{escape(row.unit)}</small>' if row.unit else ''
        cells = ''.join(map(_cell, row.cells))
        body.append(f'<tr><th scope="row">{escape(row.label)}{unit}</th>{cells}</tr>')
    return _table(f'<th></th>{head}', body)


def _cell(cell: Cell) -> str:
    if cell.text == NOT_MEASURED:
        return f'<td><abbr title="not measured">{ABSENT}</abbr></td>'
    interval = f'<small>{escape(cell.interval)}</small>' if cell.interval else ''
    return f'<td>{escape(cell.text)}{interval}</td>'


def _table(head: str, rows: Sequence[str]) -> str:
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div>'
    )


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Renders a table whose first column is text and whose others are numbers."""
    heads = ''.join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = [
        f'<tr><th scope="row">{escape(first)}</th>'
        + ''.join(f'<td>{escape(text)}</td>' for text in rest)
        + '</tr>'
        for first, *rest in rows
    ]
    return _table(heads, body)
