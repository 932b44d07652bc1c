"""The report's table as rows of figures."""

from experiments.reporting import figures


def test_figures_refer_to_the_teacher_and_leave_out_what_was_not_measured():
    summary = {
        'command': 'python -m experiments.launch',
        'models': {
            'teacher': {'bits_per_byte': {'value': 2.0, 'low': 1.9, 'high': 2.1}},
            'student': {
                'bits_per_byte': {'value': 2.5, 'low': 2.4, 'high': 2.6},
                'kl_from_teacher': {'value': 0.3, 'low': 0.2, 'high': 0.4},
                'parameters': {'total': 10, 'active': 5},
            },
        },
    }
    same = {'conditions': 'python -m experiments.launch'}
    assert figures(summary) == [
        {
            'name': 'teacher/bits_per_byte',
            'value': 2.0,
            'unit': 'bits/byte',
            'reference': 2.0,
            'ratio': 1.0,
            **same,
        },
        {
            'name': 'student/bits_per_byte',
            'value': 2.5,
            'unit': 'bits/byte',
            'reference': 2.0,
            'ratio': 1.25,
            **same,
        },
        {'name': 'student/kl_from_teacher', 'value': 0.3, 'unit': 'nats/token', **same},
    ]
