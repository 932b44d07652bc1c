"""The schema of `summary.json`, as data, and its check.

A key that was not measured is absent: no null, no NaN, no zero in its place.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

MODELS = ('teacher', 'student', 'control')
METRICS = (
    'bits_per_byte',
    'cross_entropy',
    'accuracy',
    'kl_from_teacher',
    'kl_on_own_text',
    'top1_agreement',
    'calibration_error',
)

Problems = list[str]
Check = Callable[[Any, str, Problems], None]


def validate_summary(summary: Any) -> None:
    """Checks a summary against the schema.

    Args:
        summary: what is to be written as `summary.json`.

    Raises:
        ValueError: with every missing, unknown or ill-typed key, one on each line.
    """
    problems: Problems = []
    _SUMMARY(summary, 'summary', problems)
    if problems:
        raise ValueError('The summary does not fit its schema:\n' + '\n'.join(problems))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any, where: str, problems: Problems) -> None:
    if not _is_number(value):
        problems.append(f'{where}: a finite number is required; received {value!r}')


def _count(value: Any, where: str, problems: Problems) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        problems.append(f'{where}: a whole number, zero or more, is required; received {value!r}')


def _text(value: Any, where: str, problems: Problems) -> None:
    if not isinstance(value, str) or not value:
        problems.append(f'{where}: text is required; received {value!r}')


def _flag(value: Any, where: str, problems: Problems) -> None:
    if not isinstance(value, bool):
        problems.append(f'{where}: true or false is required; received {value!r}')


def _one(value: Any, where: str, problems: Problems) -> None:
    if value != 1:
        problems.append(f'{where}: the schema is 1; received {value!r}')


def _json(value: Any, where: str, problems: Problems) -> None:
    """Accepts whatever JSON can hold; a config may hold nulls, since its defaults do."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _json(inner, f'{where}.{key}', problems)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _json(inner, f'{where}[{index}]', problems)
    elif value is not None and not isinstance(value, str | bool) and not _is_number(value):
        problems.append(f'{where}: a JSON value is required; received {value!r}')


def _object(value: Any, where: str, problems: Problems) -> None:
    if not isinstance(value, Mapping):
        problems.append(f'{where}: an object is required; received {value!r}')
    else:
        _json(value, where, problems)


def _record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """Returns the check of an object with these keys and no others."""
    known = {**required, **(optional or {})}

    def check(value: Any, where: str, problems: Problems) -> None:
        if not isinstance(value, Mapping):
            problems.append(f'{where}: an object is required; received {value!r}')
            return
        problems.extend(f'{where}.{key}: missing' for key in required if key not in value)
        for key, inner in value.items():
            if key in known:
                known[key](inner, f'{where}.{key}', problems)
            else:
                problems.append(f'{where}.{key}: unknown key; known are {", ".join(known)}')

    return check


def _each(item: Check) -> Check:
    """Returns the check of a list."""

    def check(value: Any, where: str, problems: Problems) -> None:
        if not isinstance(value, list | tuple):
            problems.append(f'{where}: a list is required; received {value!r}')
            return
        for index, inner in enumerate(value):
            item(inner, f'{where}[{index}]', problems)

    return check


def _entries(item: Check) -> Check:
    """Returns the check of an object whose keys are free."""

    def check(value: Any, where: str, problems: Problems) -> None:
        _record({}, dict.fromkeys(value, item) if isinstance(value, Mapping) else {})(
            value, where, problems
        )

    return check


def _estimate(value: Any, where: str, problems: Problems) -> None:
    """Checks a value with an interval, or without one where it could not be measured."""
    before = len(problems)
    _record({'value': _number}, {'low': _number, 'high': _number})(value, where, problems)
    if len(problems) > before:
        return
    if ('low' in value) != ('high' in value):
        problems.append(f'{where}: low and high come together; received {dict(value)!r}')
    elif 'low' in value and value['low'] > value['high']:
        problems.append(f'{where}: low must not exceed high; received {dict(value)!r}')


_PRICE = _record({'value': _number, 'chip': _text, 'price_source': _json, 'basis': _json})
_RELIABILITY = _record({'confidence': _number, 'accuracy': _estimate, 'tokens': _count})
_AGREEMENT = _record({'from': _count, 'to': _count, 'tokens': _count, 'agreement': _estimate})
_SCORE = {'value': _number}, {'low': _number, 'high': _number, 'standard_error': _number}
_EXAM = _record(
    _SCORE[0] | {'questions': _count},
    _SCORE[1] | {'higher_is_better': _flag, 'retained': _record(*_SCORE)},
)
_NEEDLE = _record({'length': _count, 'depth': _number, 'value': _number, 'questions': _count})
_MODEL = _record(
    {},
    {
        **dict.fromkeys(METRICS, _estimate),
        'reliability': _each(_RELIABILITY),
        'agreement_by_position': _each(_AGREEMENT),
        'exams': _entries(_EXAM),
        'needle': _each(_NEEDLE),
        'parameters': _record({'total': _count, 'active': _count}),
        'flops_per_token': _number,
        'bytes_per_token': _number,
        'tokens_per_second': _number,
        'usd_per_million_tokens': _PRICE,
    },
)
_COMPARISON = _record(
    {},
    {
        'control_minus_student_bits_per_byte': _estimate,
        'teacher_to_student_flops': _number,
        'teacher_to_student_usd': _number,
        'retained_accuracy': _estimate,
    },
)
_EXPERTS = _record(
    {
        'layer': _count,
        'max_violation': _number,
        'entropy': _number,
        'dead_experts': _count,
        'drop_fraction': _number,
    },
    {'gini': _number, 'max_violation_batch': _number, 'confidence': _number},
)
_PROVENANCE = _record(
    {'name': _text, 'version': _text, 'licence': _text, 'permits_training': _flag}
)
_QUANTISED = _record(
    {'weights': _text, 'trained': _flag},
    {
        'bytes_on_disk': _count,
        'bytes_in_memory': _count,
        'tokens_per_second': _number,
        'bits_per_byte': _estimate,
        'kl_from_student': _estimate,
    },
)
_STAGE = _record({'seconds': _number}, {'steps': _count, 'tokens': _count})
_START = _record(
    {'method': _text},
    {
        'source': _text,
        'source_sha256': _text,
        'provenance': _PROVENANCE,
        'options': _object,
        'calibration_tokens': _count,
    },
)
_SUMMARY = _record(
    {
        'schema': _one,
        'command': _text,
        'config': _object,
        'seed': _count,
        'versions': _entries(_text),
        'devices': _object,
        'stages': _entries(_STAGE),
        'models': _record({}, dict.fromkeys(MODELS, _MODEL)),
    },
    {
        'git_commit': _text,
        'student_start': _START,
        'comparison': _COMPARISON,
        'experts': _each(_EXPERTS),
        'quantised': _each(_QUANTISED),
        'provenance': _entries(_PROVENANCE),
    },
)
