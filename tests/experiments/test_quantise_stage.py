"""A student that is trained on to be quantised, towards itself: cut off or whole the same."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from launching import Launcher, assert_bitwise_equal, checkpoint_arrays, metric_rows

from configs import base
from experiments.study import build_study
from moe.errors import InputError
from tests.experiments import tiny

STEPS = 24
CONFIG = """
from configs import base
from tests.experiments import tiny


def get_config():
    config = tiny.get_config()
    config.teacher.train.steps = 3
    config.student.train.steps = 3
    config.evaluate.weights = ('int8',)
    config.quantise = base.quantise('int4_experts')
    config.quantise.optimizer.update(learning_rate=2e-3, warmup_steps=1)
    config.quantise.train.update(steps=24, log_every=1, checkpoint_every=8, chunk_size=64)
    return config
"""


@pytest.fixture(scope='module')
def study(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory):
    """The workdir of a study whose student was trained on, and the flags of its launch."""
    folder = tmp_path_factory.mktemp('quantise')
    (folder / 'config.py').write_text(CONFIG)
    flags = [f'--config={folder / "config.py"}', f'--config.data.source={launcher.source}']
    flags += [f'--workdir={folder / "study"}', '--stages=teacher,student,quantise,evaluate,report']
    finished = launcher.run(*flags, devices=1)
    assert finished.status == 0, finished.output
    return folder / 'study', flags


def test_it_nears_the_student_and_resumed_ends_with_the_same_bits(
    launcher: Launcher, study: tuple[pathlib.Path, list[str]]
):
    workdir, flags = study
    arrays = checkpoint_arrays(workdir, 'quantise', STEPS)
    rows = metric_rows(workdir, 'quantise')
    assert [row['step'] for row in rows] == list(range(1, STEPS + 1))
    losses = [row['loss'] for row in rows]
    assert 0 < sum(losses[-4:]) < 0.9 * sum(losses[:4])
    student = checkpoint_arrays(workdir, 'student', 3)
    moved = [
        np.abs(student[name] - arrays[name]).max() for name in student if name.startswith('params/')
    ]
    assert 0 < max(moved) < 0.1, 'it starts from the student'

    # As if it had been killed before its last checkpoint was complete.
    (workdir / 'quantise' / 'result.json').unlink()
    shutil.rmtree(workdir / 'quantise' / 'model')
    shutil.rmtree(workdir / 'quantise' / 'checkpoints' / str(STEPS))
    finished = launcher.run(*flags, devices=1)
    assert finished.status == 0, finished.output
    assert_bitwise_equal(arrays, checkpoint_arrays(workdir, 'quantise', STEPS))
    assert rows == metric_rows(workdir, 'quantise')


def test_the_report_has_what_each_kind_of_weights_saves_and_loses(
    study: tuple[pathlib.Path, list[str]],
):
    rows = json.loads((study[0] / 'summary.json').read_text())['quantised']
    kinds = [(row['weights'], row['trained']) for row in rows]
    whole, eight, four, trained = rows
    four_bits = [('int4_experts', False), ('int4_experts', True)]
    assert kinds == [('float32', False), ('int8', False), *four_bits]
    for name in ('bytes_on_disk', 'bytes_in_memory'):
        assert whole[name] > eight[name] > four[name] == trained[name] > 0
    assert all(row['bits_per_byte']['value'] > 0 for row in rows)
    assert 'kl_from_student' not in whole
    losses = [row['kl_from_student']['value'] for row in (eight, trained, four)]
    assert 0 < losses[0] < losses[2]
    assert 'Cheaper still' in (study[0] / 'report.html').read_text()


def test_what_cannot_be_quantised_is_refused_before_anything_runs():
    config = tiny.get_config()
    config.quantise = base.quantise('int8')
    config.student.model.moe.storage = 'per_expert'
    with pytest.raises(InputError, match=r"need moe\.storage='fused'"):
        build_study(config)
    config.student.model.moe.storage = 'fused'
    config.quantise.train.micro_batches = 3
    with pytest.raises(InputError, match=r'quantise\.train\.micro_batches'):
        build_study(config)
    config.quantise.weights = 'int2'
    with pytest.raises(InputError, match=r"quantise\.weights must be one of 'int8', 'fp8', 'int4_"):
        build_study(config)
