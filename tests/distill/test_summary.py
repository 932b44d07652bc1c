"""What `summary.json` must, may and must not hold."""

import copy
import json
import math

import pytest

from distill.summary import validate_summary

ESTIMATE = {'value': 2.0, 'low': 1.9, 'high': 2.1}
MODEL = {
    'bits_per_byte': ESTIMATE,
    'cross_entropy': ESTIMATE,
    'accuracy': {'value': 0.5},
    'kl_from_teacher': ESTIMATE,
    'top1_agreement': ESTIMATE,
    'calibration_error': ESTIMATE,
    'reliability': [{'confidence': 0.5, 'accuracy': ESTIMATE, 'tokens': 9}],
    'agreement_by_position': [{'from': 0, 'to': 0, 'tokens': 9, 'agreement': ESTIMATE}],
    'exams': {
        'gsm8k': {
            'value': 0.5,
            'low': 0.4,
            'high': 0.6,
            'standard_error': 0.05,
            'questions': 100,
            'higher_is_better': True,
            'retained': {'value': 0.9, 'standard_error': 0.1},
        }
    },
    'needle': [{'length': 256, 'depth': 0.5, 'value': 0.75, 'questions': 8}],
    'parameters': {'total': 1000, 'active': 400},
    'flops_per_token': 2e6,
    'bytes_per_token': 1e6,
    'tokens_per_second': 1234.5,
    'usd_per_million_tokens': {
        'value': 0.01,
        'chip': 'cpu',
        'price_source': {'hour': 0.1, 'list': None},
        'basis': 'prefill',
    },
}
SUMMARY = {
    'schema': 1,
    'command': 'python -m experiments.launch',
    'git_commit': 'abc123',
    'config': {'model': {'cap': None, 'layers': [1, 2], 'tied': True}},
    'seed': 0,
    'versions': {'jax': '0.10.2'},
    'devices': {'kind': 'cpu', 'count': 8},
    'stages': {'student': {'seconds': 1.5, 'steps': 10, 'tokens': 640}, 'report': {'seconds': 1}},
    'models': {'teacher': {}, 'student': MODEL, 'control': {'bits_per_byte': ESTIMATE}},
    'comparison': {
        'control_minus_student_bits_per_byte': {'value': -0.1, 'low': -0.2, 'high': 0.0},
        'teacher_to_student_flops': 9.0,
        'teacher_to_student_usd': 3.0,
        'retained_accuracy': ESTIMATE,
    },
    'experts': [
        {'layer': 1, 'max_violation': 0.2, 'entropy': 0.9, 'dead_experts': 0, 'drop_fraction': 0.0}
    ],
    'quantised': [{'weights': 'int8', 'trained': False, 'bytes_on_disk': 9, 'bytes_in_memory': 9}],
}
REQUIRED = ('schema', 'command', 'config', 'seed', 'versions', 'devices', 'stages', 'models')


def changed(path: tuple, value) -> dict:
    """Returns the summary with one value put in at a path."""
    summary = copy.deepcopy(SUMMARY)
    inner = summary
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return summary


def problems(summary) -> list[str]:
    """Returns what is wrong, one line each."""
    with pytest.raises(ValueError, match='does not fit its schema') as caught:
        validate_summary(summary)
    return str(caught.value).splitlines()[1:]


def test_a_whole_summary_fits():
    validate_summary(SUMMARY)
    validate_summary(json.loads(json.dumps(SUMMARY)))


def test_what_was_not_measured_may_be_absent():
    validate_summary({name: SUMMARY[name] for name in REQUIRED} | {'models': {}, 'stages': {}})


def test_the_study_itself_may_not_be_absent():
    assert problems({}) == [f'summary.{name}: missing' for name in REQUIRED]


@pytest.mark.parametrize(
    ('path', 'key'),
    [
        (('models', 'student', 'parameters'), 'active'),
        (('models', 'student', 'usd_per_million_tokens'), 'basis'),
        (('models', 'student', 'accuracy'), 'value'),
        (('stages', 'student'), 'seconds'),
        (('experts', 0), 'entropy'),
        (('models', 'student', 'exams', 'gsm8k'), 'questions'),
        (('models', 'student', 'exams', 'gsm8k', 'retained'), 'value'),
        (('models', 'student', 'needle', 0), 'depth'),
        (('models', 'student', 'agreement_by_position', 0), 'from'),
    ],
)
def test_a_missing_key_is_named_by_its_path(path, key):
    summary = copy.deepcopy(SUMMARY)
    inner = summary
    for step in path:
        inner = inner[step]
    del inner[key]
    where = '.'.join(map(str, path)).replace('.0', '[0]')
    assert problems(summary) == [f'summary.{where}.{key}: missing']


@pytest.mark.parametrize(
    ('path', 'where'),
    [
        (('perplexity',), 'summary.perplexity'),
        (('models', 'assistant'), 'summary.models.assistant'),
        (('models', 'student', 'perplexity'), 'summary.models.student.perplexity'),
        (('models', 'student', 'accuracy', 'mean'), 'summary.models.student.accuracy.mean'),
        (('comparison', 'speedup'), 'summary.comparison.speedup'),
        (('experts', 0, 'skew'), 'summary.experts[0].skew'),
        (('stages', 'student', 'loss'), 'summary.stages.student.loss'),
    ],
)
def test_an_unknown_key_is_named_by_its_path(path, where):
    (problem,) = problems(changed(path, 1))
    assert problem.startswith(f'{where}: unknown key')


@pytest.mark.parametrize('value', [None, math.nan, math.inf, True, '1.0'])
@pytest.mark.parametrize(
    ('path', 'where'),
    [
        (('models', 'student', 'flops_per_token'), 'summary.models.student.flops_per_token'),
        (('models', 'student', 'accuracy', 'value'), 'summary.models.student.accuracy.value'),
        (('models', 'student', 'accuracy', 'low'), 'summary.models.student.accuracy.low'),
        (('comparison', 'teacher_to_student_usd'), 'summary.comparison.teacher_to_student_usd'),
        (('experts', 0, 'max_violation'), 'summary.experts[0].max_violation'),
        (('stages', 'report', 'seconds'), 'summary.stages.report.seconds'),
    ],
)
def test_nothing_stands_in_for_a_number(path, where, value):
    """Neither null nor NaN: a number that was not measured has no key."""
    assert problems(changed(path, value)) == [
        f'{where}: a finite number is required; received {value!r}'
    ]


@pytest.mark.parametrize(
    ('path', 'value', 'required'),
    [
        (('schema',), 2, 'the schema is 1'),
        (('seed',), -1, 'a whole number, zero or more'),
        (('seed',), 1.0, 'a whole number, zero or more'),
        (('command',), '', 'text'),
        (('git_commit',), None, 'text'),
        (('versions', 'jax'), 1, 'text'),
        (('config',), [], 'an object'),
        (('devices', 'memory'), math.nan, 'a JSON value'),
        (('config', 'rate'), math.inf, 'a JSON value'),
        (('config', 'mesh'), {1, 2}, 'a JSON value'),
        (('models', 'student', 'parameters', 'total'), True, 'a whole number, zero or more'),
        (('models', 'student', 'bits_per_byte'), 2.0, 'an object'),
        (('models', 'student', 'bits_per_byte'), None, 'an object'),
        (('experts',), {}, 'a list'),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_by_its_path(path, value, required):
    (problem,) = problems(changed(path, value))
    assert problem.startswith(f'summary.{".".join(path)}: {required}')
    assert problem.endswith(f'received {value!r}')


def test_an_interval_has_two_ends_in_order():
    path = ('models', 'student', 'accuracy')
    (problem,) = problems(changed(path, {'value': 1.0, 'low': 0.5}))
    assert problem.startswith('summary.models.student.accuracy: low and high come together')
    (problem,) = problems(changed(path, {'value': 1.0, 'low': 2.0, 'high': 0.5}))
    assert problem.startswith('summary.models.student.accuracy: low must not exceed high')


def test_every_problem_is_told_at_once():
    summary = changed(('seed',), None)
    summary['loss'] = 1
    del summary['command']
    assert [problem.split(':')[0] for problem in problems(summary)] == [
        'summary.command',
        'summary.seed',
        'summary.loss',
    ]


@pytest.mark.parametrize('summary', [None, [], 'summary'])
def test_a_summary_is_an_object(summary):
    assert problems(summary) == [f'summary: an object is required; received {summary!r}']
