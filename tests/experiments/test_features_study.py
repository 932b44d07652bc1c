"""A study whose student is matched to its teacher inside: cut off or whole, saved without more."""

import pathlib

from launching import KILL, Launcher, assert_bitwise_equal, checkpoint_arrays, metric_rows

from distill.checkpoint import read_metadata


def test_killed_it_ends_as_the_uninterrupted_run(launcher: Launcher, tmp_path: pathlib.Path):
    config = tmp_path / 'config.py'
    config.write_text(
        'from configs import base\n'
        'from tests.experiments import tiny\n\n\n'
        'def get_config():\n'
        '    config = tiny.get_config()\n'
        '    config.teacher.model.embed_dim = 24\n'
        '    config.student.features = base.features(\n'
        "        hidden=base.feature('hidden', weight=0.5),\n"
        "        relation=base.feature('relation', heads=4),\n"
        '    )\n'
        '    return config\n'
    )
    flags = [f'--config={config}', f'--config.data.source={launcher.source}']
    flags += ['--stages=teacher,student', '--config.mesh.fsdp=2']
    one, two = tmp_path / 'one', tmp_path / 'two'
    finished = launcher.run(*flags, f'--workdir={one}', devices=2)
    assert finished.status == 0, finished.output
    two_flags = (*flags, f'--workdir={two}')
    killed = launcher.run(*two_flags, devices=2, event=('step', 'student', 8, KILL))
    assert killed.status == -KILL, killed.output
    finished = launcher.run(*two_flags, devices=2)
    assert finished.status == 0, finished.output
    arrays = checkpoint_arrays(one, 'student')
    assert_bitwise_equal(arrays, checkpoint_arrays(two, 'student'))
    rows = metric_rows(one, 'student')
    assert rows == metric_rows(two, 'student')

    losses = [row['hidden_match_loss'] for row in rows]
    assert losses[-1] < losses[0], losses
    assert all(row['relation_match_loss'] > 0 for row in rows)
    projectors = {name for name in arrays if 'projectors' in name}
    assert arrays['params/projectors/hidden'].shape == (1, 16, 24)
    assert len(projectors) > 1, 'the optimizer holds its moments'
    saved = read_metadata(one / 'student' / 'model').arrays
    own = {name for name in arrays if name.startswith(('params/', 'routing/'))} - projectors
    assert set(saved) == own
