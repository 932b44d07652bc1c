"""A workdir belongs to one config, and remembers which stages are complete."""

import ml_collections
import pytest

from configs.base import get_config
from experiments.workdir import Workdir
from moe.errors import InputError


def test_remembers_results(tmp_path):
    workdir = Workdir(tmp_path / 'study', get_config())
    assert workdir.result('teacher') is None
    workdir.complete('teacher', {'steps': 3})
    again = Workdir(tmp_path / 'study', get_config())
    assert again.require_result('teacher', wanted_by='student') == {'steps': 3}


def test_names_the_stage_that_is_missing(tmp_path):
    with pytest.raises(InputError, match=r'--stages=teacher,student'):
        Workdir(tmp_path, get_config()).require_result('teacher', wanted_by='student')


def test_refuses_the_folder_of_another_config(tmp_path):
    Workdir(tmp_path, get_config()).stage('teacher')
    other = get_config()
    other.student.model.num_layers = 7
    with pytest.raises(InputError, match=r'student.model.num_layers: 4 there, 7 now'):
        Workdir(tmp_path, other)


def test_a_config_that_wrote_nothing_may_be_mended(tmp_path):
    Workdir(tmp_path, get_config())
    mended = get_config()
    mended.data.source = 'elsewhere/*.txt'
    Workdir(tmp_path, mended)


def test_a_study_may_move_to_another_mesh(tmp_path):
    Workdir(tmp_path, get_config()).stage('teacher')
    moved = get_config()
    moved.mesh.fsdp = 4
    moved.student.train.checkpoint_every = 7
    Workdir(tmp_path, moved)


def test_a_diverged_study_may_go_on_with_more_patience(tmp_path):
    Workdir(tmp_path, get_config()).stage('teacher')
    patient = get_config()
    patient.teacher.train.max_skipped = patient.student.train.max_skipped = 50
    Workdir(tmp_path, patient)


@pytest.mark.parametrize(
    'key',
    [
        'student.terms.mesh.weight',
        'student.train.log_every_else',
        'control.train.log_every',
        'meshes.data',
    ],
)
def test_keys_that_only_resemble_free_ones_are_not(tmp_path, key: str):
    def config(value: float) -> ml_collections.ConfigDict:
        config = get_config()
        with config.unlocked():
            part = config
            *parents, name = key.split('.')
            for parent in parents:
                if parent not in part:
                    part[parent] = ml_collections.ConfigDict()
                part = part[parent]
            part[name] = value
        return config

    Workdir(tmp_path, config(1.0)).stage('teacher')
    with pytest.raises(InputError, match=f'{key}: 1.0 there, 2.0 now'):
        Workdir(tmp_path, config(2.0))


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='is a file'):
        Workdir(tmp_path / 'file', get_config())


def test_a_damaged_result_is_named(tmp_path):
    workdir = Workdir(tmp_path, get_config())
    workdir.complete('teacher', {})
    (tmp_path / 'teacher' / 'result.json').write_text('{"steps": ')
    with pytest.raises(InputError, match=r'result.json is not valid JSON'):
        workdir.result('teacher')
