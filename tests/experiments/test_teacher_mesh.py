"""A study whose teacher has devices of its own, and splits of the devices that cannot be."""

import pathlib

import jax
import numpy as np
import pytest
from launching import Launcher, metric_rows
from test_study import built

from configs import base
from experiments.teacher_mesh import make_meshes
from moe.errors import InputError
from moe.sharding import MeshConfig

CONFIG = """
from configs import base
from tests.experiments import tiny


def get_config():
    config = tiny.get_config()
    config.student.model.moe = None
    config.student.balance.selection_bias_rate = 0.0
    config.student.train.steps = config.teacher.train.steps = 4
    config.teacher.mesh = base.mesh(fsdp=2)
    config.teacher.micro_batches = 4
    return config
"""


def test_it_learns_as_beside_its_teacher(launcher: Launcher, tmp_path: pathlib.Path):
    losses = []
    beside = CONFIG.replace('base.mesh(fsdp=2)', 'None')
    for devices, config in ((4, CONFIG), (1, beside)):
        path, workdir = tmp_path / f'{devices}.py', tmp_path / str(devices)
        path.write_text(config)
        finished = launcher.run(
            *(f'--config={path}', f'--config.data.source={launcher.source}'),
            *(f'--workdir={workdir}', '--stages=teacher,student'),
            devices=devices,
        )
        assert finished.status == 0, finished.output
        losses.append([row['forward_kl'] for row in metric_rows(workdir, 'student')])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_the_last_devices_are_the_teachers():
    student, teacher = make_meshes(MeshConfig(data=-1, fsdp=2), MeshConfig(tensor=2))
    assert student.shape['data'] == 3
    assert [d.id for d in teacher.devices.flat] == [d.id for d in jax.devices()[-2:]]
    assert set(student.devices.flat) == set(jax.devices()[:-2])
    both = make_meshes(MeshConfig(data=-1), None)
    assert both[0] is both[1]


@pytest.mark.parametrize(
    ('student', 'teacher', 'message'),
    [
        (MeshConfig(-1), MeshConfig(fsdp=8), 'at most 7 of 8; received 8'),
        (MeshConfig(-1), MeshConfig(data=-1), 'at most 7 of 8; received -1 for the rest'),
        (MeshConfig(data=8), MeshConfig(2), 'takes 2 of the devices. .* exactly 8 .* there are 6'),
        (MeshConfig(-1, fsdp=4), MeshConfig(2), 'a multiple of 4 devices; there are 6'),
    ],
)
def test_splits_that_cannot_be_are_refused(student, teacher, message: str):
    with pytest.raises(InputError, match=message):
        make_meshes(student, teacher)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(InputError, match='there are 2 processes'):
        make_meshes(MeshConfig(-1), MeshConfig(2))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(targets__kind='top_k'), "targets.kind='top_k': hidden states are shipped"),
        (dict(teacher__source='ema'), "teacher.source='ema'"),
        (dict(student__rollout=base.rollout()), 'student.rollout: what is written'),
        (
            dict(student__features=base.features(usage=base.feature('usage'))),
            'student.features: what is inside',
        ),
    ],
)
def test_what_needs_the_teacher_in_the_students_program_is_refused(changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        built(teacher__mesh=base.mesh(data=2), **changes)
