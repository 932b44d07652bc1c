"""A study whose student is matched to its teacher inside: cut off or whole, saved without more."""

import pathlib
import shutil

from launching import STEPS, Launcher, assert_bitwise_equal, checkpoint_arrays, metric_rows

from distill.checkpoint import read_metadata


def test_resumed_it_ends_with_the_same_bits_and_saves_the_model_alone(
    launcher: Launcher, tmp_path: pathlib.Path
):
    config = tmp_path / 'config.py'
    config.write_text(
        'from configs import base\n'
        'from tests.experiments import tiny\n\n\n'
        'def get_config():\n'
        '    config = tiny.get_config()\n'
        '    config.teacher.model.embed_dim = 24\n'
        '    config.teacher.train.steps = 3\n'
        '    config.student.model.moe = None\n'
        '    config.student.balance.selection_bias_rate = 0.0\n'
        '    config.student.features = base.features(\n'
        "        hidden=base.feature('hidden', weight=0.5),\n"
        "        relation=base.feature('relation', heads=4),\n"
        '    )\n'
        '    return config\n'
    )
    workdir = tmp_path / 'study'
    flags = [f'--config={config}', f'--config.data.source={launcher.source}']
    flags += [f'--workdir={workdir}', '--stages=teacher,student', '--config.mesh.fsdp=2']
    finished = launcher.run(*flags, devices=2)
    assert finished.status == 0, finished.output
    arrays, rows = checkpoint_arrays(workdir, 'student'), metric_rows(workdir, 'student')

    # As if it had been killed before its last checkpoint was complete.
    student = workdir / 'student'
    (student / 'result.json').unlink()
    shutil.rmtree(student / 'model')
    shutil.rmtree(student / 'checkpoints' / str(STEPS))
    finished = launcher.run(*flags, devices=2)
    assert finished.status == 0, finished.output
    assert_bitwise_equal(arrays, checkpoint_arrays(workdir, 'student'))
    assert rows == metric_rows(workdir, 'student')

    losses = [row['hidden_match_loss'] for row in rows]
    assert losses[-1] < losses[0], losses
    assert all(row['relation_match_loss'] > 0 for row in rows)
    projectors = {name for name in arrays if 'projectors' in name}
    assert arrays['params/projectors/hidden'].shape == (1, 16, 24)
    assert len(projectors) > 1, 'the optimizer holds its moments'
    saved = read_metadata(student / 'model').arrays
    own = {name for name in arrays if name.startswith(('params/', 'routing/'))} - projectors
    assert set(saved) == own
