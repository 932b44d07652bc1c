"""The words and columns that a summary becomes."""

import pytest

from distill.exam_table import exam_rows, exams_of
from distill.tables import (
    NOT_MEASURED,
    Cell,
    dollars,
    headline,
    measured_models,
    percent,
    table_rows,
)
from distill.terminal import terminal_table

MODELS = {
    # Out of the table's order on purpose.
    'student': {
        'bits_per_byte': {'value': 1.2344, 'low': 1.2, 'high': 1.2676},
        'cross_entropy': {'value': 2.5},
        'accuracy': {'value': 0.4567, 'low': 0.44, 'high': 0.47},
        'kl_from_teacher': {'value': 0.321, 'low': 0.3, 'high': 0.35},
        'parameters': {'total': 2_500_000, 'active': 812_000},
        'flops_per_token': 1_624_000,
        'usd_per_million_tokens': {'value': 0.00123, 'chip': 'x', 'price_source': '', 'basis': ''},
    },
    'teacher': {
        'bits_per_byte': {'value': 1.1},
        'accuracy': {'value': 0.5, 'low': 0.48, 'high': 0.52},
        'parameters': {'total': 12_345_678, 'active': 12_345_678},
        'flops_per_token': 24.7e6,
    },
}
TABLE = """\
                                              teacher                 student
-----------------------------------------------------------------------------
Bits per byte, lower is better                  1.100  1.234 [1.200 to 1.268]
Cross-entropy, nats/token                           -                   2.500
Accuracy, next token            50.0 % [48.0 to 52.0]   45.7 % [44.0 to 47.0]
KL from teacher, nats/token                         -  0.321 [0.300 to 0.350]
Parameters, total                               12.3M                   2.50M
Parameters, active                              12.3M                    812k
FLOPs, per token                                24.7M                   1.62M
Price, million tokens                               -                $0.00123
- not measured
[ ] 95 % bootstrap interval over held-out documents"""


def test_the_terminal_table_letter_by_letter():
    assert terminal_table({'models': MODELS}) == TABLE


def test_a_full_table_without_intervals_explains_nothing():
    models = {'student': {'bits_per_byte': {'value': 3.0}, 'tokens_per_second': 9876}}
    assert terminal_table({'models': models}) == (
        '                                student\n'
        '---------------------------------------\n'
        'Bits per byte, lower is better    3.000\n'
        'Tokens per second, prefill        9.88k'
    )


def test_what_was_not_measured_is_neither_zero_nor_a_row():
    rows = {row.label: row for row in table_rows({'models': MODELS})}
    assert rows['Price'].cells == (Cell(NOT_MEASURED), Cell('$0.00123'))
    assert rows['Cross-entropy'].cells == (Cell('-'), Cell('2.500', ''))
    # Nobody's agreement, bytes and speed were measured.
    assert not {'Top-1 agreement', 'Bytes', 'Tokens per second'} & set(rows)
    measured_zero = {'models': {'student': {'kl_from_teacher': {'value': 0.0}}}}
    assert table_rows(measured_zero)[0].cells == (Cell('0.000'),)


def test_models_stand_in_the_order_of_the_table():
    models = {'control': {}, 'student': {}, 'teacher': {}}
    assert measured_models({'models': models}) == ('teacher', 'student', 'control')
    assert measured_models({'models': {'control': {}}}) == ('control',)


@pytest.mark.parametrize(
    ('number', 'text'),
    [
        (0, '$0.00'),
        (12345.6, '$12,346'),
        (100, '$100'),
        (12.345, '$12.35'),
        (1.5, '$1.50'),
        (0.123456, '$0.123'),
        (0.0000012345, '$0.00000123'),
    ],
)
def test_prices_have_three_digits_and_no_exponent(number, text):
    assert dollars(number) == text


def test_shares_become_percentages():
    assert percent(0.12345) == '12.3 %'
    assert percent(1) == '100.0 %'


def summary_of(gain=None, flops=None) -> dict:
    comparison = {}
    if gain is not None:
        value, *ends = gain
        estimate = {'value': value, **dict(zip(('low', 'high'), ends, strict=False))}
        comparison['control_minus_student_bits_per_byte'] = estimate
    if flops is not None:
        comparison['teacher_to_student_flops'] = flops
    return {'models': {'student': {'bits_per_byte': {'value': 1.25}}}, 'comparison': comparison}


def test_the_headline_says_that_the_student_beat_its_control():
    assert headline(summary_of((0.05, 0.02, 0.08), flops=9.04)) == (
        "At 1/9.0 of its teacher's FLOPs per token, the student reads held-out text at 1.250 bits "
        'per byte, 0.050 fewer than the same student trained without a teacher (95 % interval '
        '0.020 to 0.080).'
    )


def test_the_headline_says_that_the_control_beat_the_student():
    assert headline(summary_of((-0.05, -0.08, -0.02))) == (
        'The student reads held-out text at 1.250 bits per byte, but it did not beat its control: '
        'the same student trained without a teacher needs 0.050 fewer (95 % interval 0.020 to '
        '0.080).'
    )


@pytest.mark.parametrize('gain', [(0.01, -0.02, 0.04), (-0.01, -0.04, 0.02)])
def test_the_headline_claims_nothing_where_the_interval_includes_zero(gain):
    value, low, high = (f'{number:.3f}' for number in gain)
    assert headline(summary_of(gain)) == (
        'The student reads held-out text at 1.250 bits per byte, but it did not measurably beat '
        'its control: the gain over the same student trained without a teacher is '
        f'{value} bits per byte, and its 95 % interval, {low} to {high}, includes zero.'
    )


@pytest.mark.parametrize('gain', [(0.02, 0.0, 0.04), (-0.02, -0.04, 0.0)])
def test_an_interval_that_touches_zero_includes_it(gain):
    assert 'did not measurably beat its control' in headline(summary_of(gain))


@pytest.mark.parametrize(('value', 'way'), [(0.05, 'fewer'), (-0.05, 'more')])
def test_the_headline_calls_a_gain_without_an_interval_chance(value, way):
    assert headline(summary_of((value,))) == (
        f'The student reads held-out text at 1.250 bits per byte, 0.050 {way} than the same '
        'student trained without a teacher; no interval could be measured, so this may be chance.'
    )


def test_the_headline_says_what_was_not_measured():
    assert headline(summary_of()) == (
        'The student reads held-out text at 1.250 bits per byte; no control was measured, so what '
        'distillation bought is unknown.'
    )
    assert headline({'models': {'teacher': {}}}).startswith('No student was measured')


def test_a_student_dearer_than_its_teacher_is_called_so():
    assert headline(summary_of(flops=0.5)).startswith(
        "At 2.0 times its teacher's FLOPs per token, the student reads"
    )


EXAMS = {
    'teacher': {
        'gsm8k': {'value': 0.5, 'low': 0.4, 'high': 0.6, 'standard_error': 0.05, 'questions': 1319}
        | {'higher_is_better': True},
        'wiki': {'value': 12.5, 'standard_error': 0.25, 'questions': 62},
    },
    'student': {
        'gsm8k': {'value': 0.25, 'questions': 1319, 'higher_is_better': True}
        | {'retained': {'value': 0.5, 'low': 0.4, 'high': 0.6, 'standard_error': 0.051}},
        'wiki': {'value': 25.0, 'questions': 62},
    },
    'control': {},
}


def test_exams_have_a_row_and_one_for_what_is_retained():
    rows = [(row.label, row.unit, *row.cells) for row in exam_rows(EXAMS)]
    missing = Cell(NOT_MEASURED)
    assert rows == [
        (
            'gsm8k',
            '1,319 questions',
            Cell('50.0 %', '40.0 to 60.0, \u00b15.0'),
            Cell('25.0 %'),
            missing,
        ),
        ('gsm8k', "of the teacher's", missing, Cell('50.0 %', '40.0 to 60.0, \u00b15.1'), missing),
        ('wiki', '62 questions', Cell('12.500', '\u00b10.250'), Cell('25.000'), missing),
    ]


def test_the_terminal_table_has_the_exams_after_the_figures():
    summary = {'models': {name: {'exams': exams} for name, exams in EXAMS.items()}}
    assert exams_of(summary) == EXAMS
    assert exams_of({'models': {'student': {}}}) == {}
    lines = terminal_table(summary).splitlines()
    assert lines[2].split('  ')[0] == 'gsm8k, 1,319 questions'
    assert '50.0 % [40.0 to 60.0, \u00b15.0]' in lines[2]
    assert lines[-2] == (
        '[ ] 95 % bootstrap interval over held-out documents, or the questions of an exam'
    )
    assert lines[-1] == '\u00b1 standard error'
