"""A study whose teacher has a tokenizer of its own: aligned by bytes, from config to report."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest
import tiny
from launching import Launcher, metric_rows

from configs import base
from distill.across import CrossTokenizer
from distill.checkpoint import read_metadata
from distill.config import RolloutConfig
from distill.objective import Term
from experiments.build import build
from experiments.init_config import InitConfig
from experiments.study import StudyConfig, build_study
from moe.errors import InputError

UPCYCLED = build(InitConfig, base.init().to_dict() | {'method': 'upcycle'}, 'init')

CONFIG = """
from configs import base
from tests.experiments import tiny


def get_config():
    config = tiny.get_config()
    config.teacher.source = 'checkpoint'
    config.teacher.checkpoint = 'TEACHER'
    config.student.model.moe = None
    config.student.balance.selection_bias_rate = 0.0
    config.student.train.steps = 6
    config.student.terms = dict(ce=base.term('cross_entropy', weight=0.1))
    config.student.cross_tokenizer = base.cross_tokenizer('gold', weight=2.0)
    return config
"""


def test_from_config_to_report(launcher: Launcher, tmp_path: pathlib.Path):
    finished = launcher.run(
        *launcher.flags(tmp_path / 'other', '--stages=teacher'),
        '--config.data.tokenizer=bpe',
        '--config.data.vocab_size=290',
        '--config.teacher.train.steps=3',
        devices=2,
    )
    assert finished.status == 0, finished.output
    config = tmp_path / 'config.py'
    config.write_text(CONFIG.replace('TEACHER', str(tmp_path / 'other' / 'teacher')))
    workdir = tmp_path / 'study'
    flags = [f'--config={config}', f'--config.data.source={launcher.source}']
    flags += [f'--workdir={workdir}', '--stages=teacher,student,control,evaluate,report']
    finished = launcher.run(*flags, devices=2)
    assert finished.status == 0, finished.output
    rows = metric_rows(workdir, 'student')
    assert rows[-1]['gold_loss'] < rows[0]['gold_loss']
    assert all(0.5 < row['aligned'] < 1 for row in rows)
    summary = json.loads((workdir / 'summary.json').read_text())
    models = summary['models']
    assert np.isfinite([one['bits_per_byte']['value'] for one in models.values()]).all()
    # What is of ids that the other does not have is not measured.
    assert 'kl_from_teacher' not in models['student']
    assert set(summary['comparison']) >= {'control_minus_student_bits_per_byte'}
    assert 'retained_accuracy' not in summary['comparison']

    dual = [f'--workdir={tmp_path / "dual"}', '--config.student.cross_tokenizer.method=dskd']
    finished = launcher.run(*flags, *dual, '--stages=teacher,student', devices=2)
    assert finished.status == 0, finished.output
    rows = metric_rows(tmp_path / 'dual', 'student')
    assert rows[-1]['dskd_projection'] < rows[0]['dskd_projection']
    # The maps between the spaces are not part of what is saved.
    saved = read_metadata(tmp_path / 'dual' / 'student' / 'model').arrays
    assert set(saved) == set(read_metadata(workdir / 'student' / 'model').arrays)

    finished = launcher.run(*flags, '--config.targets.kind=top_k', devices=2)
    assert finished.status == 2, finished.output
    assert "student.cross_tokenizer cannot go with targets.kind='top_k'" in finished.output


def aligned(**changes: Any) -> StudyConfig:
    """A study across tokenizers; the teacher's folder is not looked for."""
    study = build_study(tiny.get_config())
    parts: dict[str, Any] = {
        'student': dict(cross_tokenizer=CrossTokenizer('uld'), terms={'ce': Term('cross_entropy')}),
        'teacher': dict(source='checkpoint', checkpoint='elsewhere'),
    }
    for key, value in changes.items():
        part, name = key.split('__')
        parts.setdefault(part, {})[name] = value
    replaced: Any = {
        part: dataclasses.replace(getattr(study, part), **fields) for part, fields in parts.items()
    }
    return dataclasses.replace(study, **replaced)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(teacher__source='train', teacher__checkpoint=None), "source='train': such a teacher"),
        (dict(teacher__source='ema', teacher__checkpoint=None), "source='ema': such a teacher"),
        (dict(targets__kind='top_k', targets__cached=True), "targets.kind='top_k'"),
        (
            dict(student__rollout=RolloutConfig(max_new_tokens=4)),
            'student.rollout: what is written',
        ),
        (dict(student__init=UPCYCLED), "init.method='upcycle' from the teacher"),
    ],
)
def test_what_needs_one_tokenizer_is_refused(changes: dict, message: str):
    assert aligned().student.objective().needs_teacher
    with pytest.raises(InputError, match=message):
        aligned(**changes)


def test_terms_that_compare_id_by_id_are_refused_by_name():
    config = tiny.get_config()
    config.student.cross_tokenizer = base.cross_tokenizer('uld')
    with pytest.raises(InputError, match='forward_kl: such terms compare id by id'):
        build_study(config)
