"""A workdir belongs to one config, and remembers which stages are complete."""

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
