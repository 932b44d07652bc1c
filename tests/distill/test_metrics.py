"""Means, metric files and the progress line, against literal values."""

import io
import json
import math

import jax.numpy as jnp
import pytest

from distill.metrics import (
    JsonlWriter,
    Metrics,
    ProgressLine,
    format_duration,
    format_progress,
    format_quantity,
)
from moe.errors import InputError


class _Terminal(io.StringIO):
    def isatty(self):
        return True


class _Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_mean_is_of_all_tokens_and_absent_without_any():
    metrics = Metrics()
    metrics.add({'loss': (jnp.asarray(6.0), jnp.asarray(2.0)), 'kl': (0.0, 0.0)})
    metrics.add({'loss': (jnp.asarray(1.0), jnp.asarray(8.0)), 'late': (3.0, 1.0)})
    # (6 + 1) / (2 + 8), not the mean of 3 and 1/8.
    assert metrics.means() == {'loss': 0.7, 'late': 3.0}
    assert Metrics().means() == {}


def test_sums_are_added_in_float64():
    metrics = Metrics()
    for _ in range(4):
        metrics.add({'x': (jnp.float32(2**24), jnp.float32(1.0))})
    metrics.add({'x': (jnp.float32(1.0), jnp.float32(0.0))})
    assert metrics.means() == {'x': (4 * 2**24 + 1) / 4}


def test_sum_that_is_not_finite_stays_so():
    metrics = Metrics()
    metrics.add({'loss': (float('nan'), 1.0)})
    assert math.isnan(metrics.means()['loss'])


def test_jsonl_lines(tmp_path):
    path = tmp_path / 'run' / 'metrics.jsonl'
    writer = JsonlWriter(path)
    writer.write(1, {'loss': 2.5, 'norm': float('inf')})
    assert path.read_text() == '{"step": 1, "loss": 2.5, "norm": null}\n'  # before it is closed
    writer.write(2, {'loss': jnp.float32(0.5)})
    writer.close()
    assert path.read_text().splitlines()[1] == '{"step": 2, "loss": 0.5}'


@pytest.mark.parametrize(
    ('restored_step', 'kept'), [(None, []), (0, []), (3, [1, 3]), (4, [1, 3]), (9, [1, 3, 5])]
)
def test_resumed_jsonl_drops_the_steps_that_are_made_again(tmp_path, restored_step, kept):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 5}\n{"step": 7, "lo')  # killed in a write
    writer = JsonlWriter(path, restored_step=restored_step)
    writer.write(8, {})
    writer.close()
    assert [json.loads(line)['step'] for line in path.read_text().splitlines()] == [*kept, 8]


def test_whole_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1}\n{"step": 2}')
    JsonlWriter(path, restored_step=2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize('line', ['{"step": 2, "lo', '{"loss": 1.0}', '[1]', '7'])
def test_broken_line_is_named(tmp_path, line):
    path = tmp_path / 'metrics.jsonl'
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(InputError, match=r'metrics\.jsonl, line 2, must be a JSON object'):
        JsonlWriter(path, restored_step=3)
    assert path.read_text().splitlines()[1] == line  # nothing was lost


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [
        (-1, '0s'),
        (0.4, '0s'),
        (59.4, '59s'),
        (59.6, '1m 00s'),
        (65, '1m 05s'),
        (3599.6, '1h 00m'),
        (7383, '2h 03m'),
        (86400 * 3 + 3600 * 4 + 59, '3d 04h'),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        (0, '0.00'),
        (8.25, '8.25'),
        (9.996, '10.0'),
        (99.94, '99.9'),
        (99.96, '100'),
        (950, '950'),
        (999.4, '999'),
        (999.6, '1.00k'),
        (12_345, '12.3k'),
        (999_600, '1.00M'),
        (1_254_000, '1.25M'),
        (3e9, '3.00G'),
    ],
)
def test_quantities(value, text):
    assert format_quantity(value) == text


def test_progress_text():
    full = format_progress(
        'student', 120, 1000, loss=2.34567, tokens_per_second=12_345, seconds_left=65
    )
    assert full == 'student  120/1,000  loss 2.3457  12.3k tokens/s  1m 05s left'
    assert format_progress('teacher', 0, 5) == 'teacher  0/5'
    assert format_progress('s', 1, 5, loss=float('nan')) == 's  1/5  loss nan'


def test_progress_line_rewrites_itself_and_leaves_out_the_first_step():
    stream, clock = _Terminal(), _Clock()
    with ProgressLine('s', 9, stream, clock=clock) as line:
        line.update(1, tokens=50, loss=1.0)  # whatever compiled before it is in no rate
        clock.now += 4.0
        line.update(3, tokens=450, loss=0.5)  # 400 tokens in 4 s; 6 steps left at 2 s each
        line.update(9, tokens=450)
    first, second = 's  1/9  loss 1.0000', 's  3/9  loss 0.5000  100 tokens/s  12s left'
    third = 's  9/9  100 tokens/s  0s left'.ljust(len(second))
    assert stream.getvalue() == f'\r{first}\r{second}\r{third}\n'


def test_progress_is_silent_where_nobody_watches():
    stream = io.StringIO()
    with ProgressLine('s', 9, stream) as line:
        line.update(1, tokens=50)
    assert stream.getvalue() == ''
    untouched = _Terminal()
    ProgressLine('s', 9, untouched).close()
    assert untouched.getvalue() == ''


def test_the_line_says_what_it_waits_for_on_a_terminal_alone():
    terminal, file = _Terminal(), io.StringIO()
    for stream in (terminal, file):
        line = ProgressLine('teacher', 10, stream)
        line.say('compiling')
        line.say('ready')
        line.close()
    assert terminal.getvalue() == '\rteacher  compiling\rteacher  ready    \n'
    assert file.getvalue() == ''
