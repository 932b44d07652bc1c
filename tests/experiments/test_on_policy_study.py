"""A study whose student writes what it learns from, taught by its own average: cut off or whole."""

import pathlib

import numpy as np
from launching import KILL, Launcher, assert_bitwise_equal, checkpoint_arrays, metric_rows

from distill.checkpoint import read_metadata

FLAGS = (
    '--stages=teacher,student',
    '--config.teacher.source=ema',
    '--config.teacher.ema_decay=0.5',
)


def test_killed_it_ends_as_the_uninterrupted_run(launcher: Launcher, tmp_path: pathlib.Path):
    config = tmp_path / 'config.py'
    config.write_text(
        'from configs import base\n'
        'from tests.experiments import tiny\n\n\n'
        'def get_config():\n'
        '    config = tiny.get_config()\n'
        '    config.student.model.moe = None\n'
        '    config.student.balance.selection_bias_rate = 0.0\n'
        '    config.student.rollout = base.rollout()\n'
        '    config.student.rollout.update(max_new_tokens=4, replay_share=0.5, staleness=3)\n'
        "    config.student.terms.kl.update(name='jsd', beta=0.5)\n"
        '    return config\n'
    )
    flags = [f'--config={config}', f'--config.data.source={launcher.source}', *FLAGS]
    one, two = tmp_path / 'one', tmp_path / 'two'
    finished = launcher.run(*flags, f'--workdir={one}', devices=1)
    assert finished.status == 0, finished.output
    two_flags = (*flags, f'--workdir={two}')
    killed = launcher.run(*two_flags, devices=1, event=('step', 'student', 8, KILL))
    assert killed.status == -KILL, killed.output
    finished = launcher.run(*two_flags, devices=1)
    assert finished.status == 0, finished.output
    arrays = checkpoint_arrays(one, 'student')
    assert_bitwise_equal(arrays, checkpoint_arrays(two, 'student'))
    rows = metric_rows(one, 'student')
    assert rows == metric_rows(two, 'student')

    shares = [row['replayed'] for row in rows]
    assert {0.0, 1.0} == set(shares), shares
    assert all(row['student_written'] == 0.5 for row in rows)
    average = [name for name in arrays if name.startswith('ema/params')]
    assert average
    assert any(np.abs(arrays[name] - arrays[name[len('ema/') :]]).max() > 1e-4 for name in average)
    taught_by = read_metadata(one / 'student' / 'checkpoints').metadata['identity']['teacher']
    assert taught_by['provenance']['name'] == 'an average of the student'
