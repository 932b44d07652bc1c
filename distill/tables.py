"""What a summary says, in words and in columns: headline and table rows."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from distill.metrics import format_quantity
from distill.provenance import FROM_WEIGHTS, in_words
from distill.summary import METRICS, MODELS

NOT_MEASURED = '-'

Summary = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of the table as text.

    Attributes:
        text: the value, or `NOT_MEASURED`.
        interval: 'low to high', or '' where none was measured.
    """

    text: str
    interval: str = ''


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a label, a unit, and a cell for each model."""

    label: str
    unit: str
    cells: tuple[Cell, ...]


def dollars(number: float) -> str:
    """Formats a price with three significant digits, never in exponents."""
    if abs(number) >= 100:
        return f'${number:,.0f}'
    decimals = 2 if number == 0 else max(2, 2 - math.floor(math.log10(abs(number))))
    return f'${number:.{decimals}f}'


def percent(share: float) -> str:
    """Formats a share in [0, 1] as a percentage with one decimal."""
    return f'{100 * share:.1f} %'


def three(number: float) -> str:
    """Formats a number with three decimals."""
    return f'{number:.3f}'


Format = Callable[[float], str]

_METRIC_ROWS: dict[str, tuple[str, str, Format]] = {
    'bits_per_byte': ('Bits per byte', 'lower is better', three),
    'cross_entropy': ('Cross-entropy', 'nats/token', three),
    'accuracy': ('Accuracy', 'next token', percent),
    'kl_from_teacher': ('KL from teacher', 'nats/token', three),
    'kl_on_own_text': ('KL on own text', 'nats/token', three),
    'top1_agreement': ('Top-1 agreement', 'with teacher', percent),
    'calibration_error': ('Calibration error', 'of the likeliest token', percent),
}
_COST_ROWS: tuple[tuple[tuple[str, ...], str, str, Format], ...] = (
    (('parameters', 'total'), 'Parameters', 'total', format_quantity),
    (('parameters', 'active'), 'Parameters', 'active', format_quantity),
    (('flops_per_token',), 'FLOPs', 'per token', format_quantity),
    (('bytes_per_token',), 'Bytes', 'per token', format_quantity),
    (('tokens_per_second',), 'Tokens per second', 'prefill', format_quantity),
    (('usd_per_million_tokens', 'value'), 'Price', 'million tokens', dollars),
)


def measured_models(summary: Summary) -> tuple[str, ...]:
    """Returns the names of the models that the summary has, in the order of the table."""
    return tuple(name for name in MODELS if name in summary['models'])


def table_rows(summary: Summary) -> list[Row]:
    """Lays out the table of models: a column for each model, a row for each number.

    Args:
        summary: of the schema of `summary.json`.

    Returns:
        Rows in reading order, without those that no model has. What one model lacks is
        `NOT_MEASURED`.
    """
    models = [summary['models'][name] for name in measured_models(summary)]
    rows = []
    for metric in METRICS:
        label, unit, form = _METRIC_ROWS[metric]
        rows.append(Row(label, unit, tuple(estimate_cell(m.get(metric), form) for m in models)))
    for path, label, unit, form in _COST_ROWS:
        numbers = [_at(model, path) for model in models]
        cells = tuple(Cell(NOT_MEASURED if n is None else form(n)) for n in numbers)
        rows.append(Row(label, unit, cells))
    return [row for row in rows if any(cell.text != NOT_MEASURED for cell in row.cells)]


def _at(model: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = model
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def estimate_cell(estimate: Mapping[str, float] | None, form: Format) -> Cell:
    """Writes a value with its interval, or that it was not measured."""
    if estimate is None:
        return Cell(NOT_MEASURED)
    return Cell(form(estimate['value']), _interval(estimate, form))


def _interval(estimate: Mapping[str, float], form: Format) -> str:
    if 'low' not in estimate:
        return ''
    # The unit stands with the value, and need not be repeated.
    low, high = (form(estimate[end]).removesuffix(' %') for end in ('low', 'high'))
    return f'{low} to {high}'


def headline(summary: Summary) -> str:
    """States in one sentence what was found, whichever way it went.

    Distillation counts as a gain only where the whole 95 % interval of the paired difference
    between control and student lies above zero.

    Args:
        summary: of the schema of `summary.json`.

    Returns:
        A sentence, plain text.
    """
    student = summary['models'].get('student', {}).get('bits_per_byte')
    if student is None:
        return 'No student was measured, so there is nothing to report about distillation yet.'
    comparison = summary.get('comparison', {})
    reads = f'the student reads held-out text at {student["value"]:.3f} bits per byte'
    reads = _cost_clause(comparison.get('teacher_to_student_flops')) + reads
    gain = comparison.get('control_minus_student_bits_per_byte')
    sentence = f'{reads}{_verdict(gain)}'
    return sentence[0].upper() + sentence[1:]


def _cost_clause(ratio: float | None) -> str:
    if ratio is None:
        return ''
    if ratio > 1:
        return f"at 1/{ratio:.1f} of its teacher's FLOPs per token, "
    return f"at {1 / ratio:.1f} times its teacher's FLOPs per token, "


def _verdict(gain: Mapping[str, float] | None) -> str:
    if gain is None:
        return '; no control was measured, so what distillation bought is unknown.'
    value = gain['value']
    size = f'{abs(value):.3f}'
    if 'low' not in gain:
        way = 'fewer' if value > 0 else 'more'
        return (
            f', {size} {way} than the same student trained without a teacher; no interval could be '
            'measured, so this may be chance.'
        )
    low, high = gain['low'], gain['high']
    if low > 0:
        return (
            f', {size} fewer than the same student trained without a teacher (95 % interval '
            f'{low:.3f} to {high:.3f}).'
        )
    if high < 0:
        return (
            ', but it did not beat its control: the same student trained without a teacher needs '
            f'{size} fewer (95 % interval {-high:.3f} to {-low:.3f}).'
        )
    return (
        ', but it did not measurably beat its control: the gain over the same student trained '
        f'without a teacher is {value:.3f} bits per byte, and its 95 % interval, {low:.3f} to '
        f'{high:.3f}, includes zero.'
    )


def student_start(summary: Summary) -> str:
    """Says in one sentence what student and control started from.

    Args:
        summary: of the schema of `summary.json`.

    Returns:
        A sentence, plain text; '' where the summary does not say.
    """
    start = summary.get('student_start')
    if start is None:
        return ''
    if start['method'] == 'random':
        return 'Student and control start at random.'
    options = [f'{name}={value}' for name, value in start.get('options', {}).items()]
    measured = start.get('calibration_tokens')
    if measured is not None:
        options.append(f'measured on {format_quantity(measured)} tokens of the train split')
    source = start['source']
    if 'provenance' in start:
        source = f'{source} {in_words(start["provenance"], FROM_WEIGHTS)}'
    return (
        f'Student and control start from the {source}, by {start["method"]!r}'
        f'{" (" + ", ".join(options) + ")" if options else ""}.'
    )
