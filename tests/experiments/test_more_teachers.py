"""A study of two teachers, of whom a field of the data chooses one for each document."""

import json
import pathlib
import shutil

import numpy as np
from launching import Launcher, checkpoint_arrays

from distill.checkpoint import read_metadata

CONFIG = """
from configs import base
from tests.experiments import tiny


def get_config():
    config = tiny.get_config()
    config.student.model.moe = None
    config.student.train.steps = config.teacher.train.steps = 4
    config.student.balance.selection_bias_rate = 0.0
    more = base.further_teachers(verse='MORE')
    more.verse.model = config.teacher.model.copy_and_resolve_references()
    config.more_teachers = more
    return config
"""


def test_each_document_has_its_teacher(launcher: Launcher, tmp_path: pathlib.Path):
    source = tmp_path / 'text.jsonl'
    kinds = ['verse', 'prose']
    rows = [
        {'text': f'{i} ' + 'a cat sat on the mat ' * 8, 'kind': kinds[i % 2]} for i in range(12)
    ]
    source.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    finished = launcher.run(
        '--config=tests/experiments/tiny.py',
        f'--config.data.source={source}',
        f'--workdir={tmp_path / "other"}',
        '--config.teacher.train.steps=2',
        '--config.teacher.optimizer.learning_rate=0.03',
        '--config.teacher.optimizer.warmup_steps=1',
        '--stages=teacher',
        devices=1,
    )
    assert finished.status == 0, finished.output
    config = tmp_path / 'config.py'
    config.write_text(CONFIG.replace('MORE', str(tmp_path / 'other' / 'teacher')))
    flags = (f'--config={config}', f'--config.data.source={source}', '--stages=teacher,student')
    arrays = {}
    for name, more in (('routed', ('--config.data.route_field=kind',)), ('all', ())):
        workdir = tmp_path / name
        if arrays:
            # What the first of the two trained already.
            shutil.copytree(tmp_path / 'routed' / 'teacher', workdir / 'teacher')
        finished = launcher.run(*flags, *more, f'--workdir={workdir}', devices=1)
        assert finished.status == 0, finished.output
        arrays[name] = checkpoint_arrays(workdir, 'student', step=4)
    moved = [np.abs(arrays['routed'][k] - arrays['all'][k]).max() for k in arrays['all']]
    assert max(moved) > 1e-4
    taught_by = read_metadata(tmp_path / 'all' / 'student' / 'checkpoints').metadata['identity']
    assert list(taught_by['teacher']['others']) == ['verse']
    assert taught_by['teacher']['others']['verse']['sha256'] != taught_by['teacher']['sha256']
