"""Variants over seeds: what can be shared is, what cannot be compared is not, and sums by hand."""

import json
import os
import pathlib

import ml_collections
import numpy as np
import pytest
from launching import Launcher, checkpoint_arrays
from tiny import get_config

from experiments.sweep_config import build_runs
from experiments.sweep_runs import figures, share
from moe.errors import InputError

SWEEP = """
import runpy
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.study = runpy.run_path('tests/experiments/tiny.py')['get_config']()
    config.study.teacher.train.steps = config.study.student.train.steps = 4
    config.study.student.model.moe.dispatch = 'dense'
    config.study.data.source = SOURCE
    config.seeds = (3,)
    config.baseline = 'forward'
    config.variants = dict(
        forward=dict(student=dict(terms=dict(ce=dict(weight=0.2)))),
        upcycled=dict(student=dict(init=dict(method='upcycle'))),
    )
    return config
"""
VARIANTS, SEED = ('forward', 'upcycled'), 3
TAUGHT = {'tokenizer', 'tokens', 'teacher'}


@pytest.fixture(scope='module')
def swept(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of a sweep that was run, and once more."""
    folder = tmp_path_factory.mktemp('sweep')
    config = folder / 'sweep.py'
    config.write_text(SWEEP.replace('SOURCE', repr(launcher.source)))
    argv = (f'--config={config}', f'--workdir={folder / "runs"}', f'--json={folder / "rows.json"}')
    finished = launcher.run(*argv, command='sweep', devices=1)
    assert finished.status == 0, finished.output
    before = (folder / 'runs' / 'comparison.json').read_text()
    (folder / 'runs' / 'upcycled' / 'seed_3' / 'report' / 'result.json').unlink()
    finished = launcher.run(*argv, command='sweep', devices=1)
    assert finished.status == 0, finished.output
    assert 'upcycled/seed_3, skipped' in finished.output
    again = (folder / 'runs' / 'comparison.json').read_text()
    assert json.loads(again)['variants'] == json.loads(before)['variants']
    return folder / 'runs'


def summary(workdir: pathlib.Path, variant: str) -> dict:
    return json.loads((workdir / variant / f'seed_{SEED}' / 'summary.json').read_text())


def test_a_sweep_compares_what_its_studies_measured(swept: pathlib.Path):
    """The arithmetic of several seeds is in tests/distill/test_comparison.py."""
    comparison = json.loads((swept / 'comparison.json').read_text())
    assert comparison['seeds'] == [SEED]
    assert comparison['tokens'] == 4 * 8 * 16
    for who in ('student', 'control'):
        measured = [
            summary(swept, variant)['models'][who]['bits_per_byte']['value'] for variant in VARIANTS
        ]
        for variant, value in zip(VARIANTS, measured, strict=True):
            compared = comparison['variants'][variant]['models'][who]['bits_per_byte']
            assert compared == {'value': value, 'seeds': [value]}
        difference = comparison['variants']['upcycled']['difference'][who]['bits_per_byte']
        assert difference['value'] == pytest.approx(measured[1] - measured[0])
    starts = [summary(swept, variant)['student_start']['method'] for variant in VARIANTS]
    assert starts == ['random', 'upcycle']
    rows = json.loads((swept.parent / 'rows.json').read_text())
    assert rows == figures(comparison)
    assert len(rows) == 2 * 2 * 6  # variants, models, metrics
    assert '| upcycled | student |' in (swept / 'comparison.md').read_text()
    assert (swept / 'comparison.png').read_bytes().startswith(b'\x89PNG')


def test_the_teacher_of_a_seed_is_trained_once(swept: pathlib.Path):
    first, second = (swept / variant / f'seed_{SEED}' for variant in VARIANTS)
    assert not (first / 'teacher').is_symlink()
    assert (second / 'teacher').resolve() == (first / 'teacher').resolve()
    students = [checkpoint_arrays(each, 'student', step=4) for each in (first, second)]
    name = next(name for name in students[0] if 'down' in name)
    assert np.abs(students[0][name] - students[1][name]).max() > 0


@pytest.mark.parametrize(
    ('changes', 'shared'),
    [
        (dict(student=dict(terms=dict(kl=dict(name='reverse_kl')))), TAUGHT | {'control'}),
        (dict(targets=dict(kind='top_k')), TAUGHT | {'control'}),
        (dict(student=dict(init=dict(method='upcycle'))), TAUGHT),
        (dict(student=dict(optimizer=dict(learning_rate=0.1))), TAUGHT),
    ],
    ids=['terms', 'targets', 'init', 'optimizer'],
)
def test_what_hangs_on_the_same_is_shared(
    tmp_path: pathlib.Path, changes: dict[str, object], shared: set[str]
):
    runs = build_runs(sweep_of(variants=dict(b=changes)))
    share(runs[1], runs[:1], tmp_path)
    links = {link.name: os.readlink(link) for link in (tmp_path / 'b' / 'seed_0').iterdir()}
    assert links == {name: f'../../a/seed_0/{name}' for name in shared}
    # Another seed has another teacher; what is there already stays.
    share(runs[2], runs[:2], tmp_path)
    share(runs[1], runs[:1], tmp_path)
    assert not (tmp_path / 'a').exists()


def test_another_teacher_is_not_shared(tmp_path: pathlib.Path):
    runs = build_runs(sweep_of(variants=dict(b=dict(teacher=dict(train=dict(steps=5))))))
    share(runs[1], runs[:1], tmp_path)
    assert not (tmp_path / 'b').exists()


def sweep_of(**changes: object) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.study = get_config()
    config.seeds = (0, 1)
    config.baseline = 'a'
    config.variants = dict(a=dict(), b=dict(student=dict(terms=dict(kl=dict(name='reverse_kl')))))
    with config.ignore_type():
        config.update(changes)
    return config


def test_a_variant_may_have_a_term_of_its_own():
    added = dict(student=dict(terms=dict(tv=dict(name='total_variation', weight=0.5))))
    runs = build_runs(sweep_of(variants=dict(b=added)))
    assert set(runs[0].study.student.terms) == {'kl', 'ce'}
    assert runs[1].study.student.terms['tv'].weight == 0.5


def test_every_variant_runs_with_every_seed():
    runs = build_runs(sweep_of())
    assert [(run.variant, run.seed) for run in runs] == [('a', 0), ('b', 0), ('a', 1), ('b', 1)]
    assert [run.study.seed for run in runs] == [0, 0, 1, 1]
    assert [run.study.student.terms['kl'].name for run in runs[:2]] == ['forward_kl', 'reverse_kl']


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'seed': (1,)}, "no key 'seed'. Did you mean 'seeds'"),
        ({'seeds': ()}, 'config.seeds must be different numbers'),
        ({'seeds': (1, 1)}, 'config.seeds must be different numbers'),
        ({'baseline': 'c'}, "received a, b and 'c'"),
        ({'variants': dict(b=dict(studnt=dict()))}, "b: study has no key 'studnt'. Did you mean"),
        (
            {'variants': dict(b=dict(student=dict(train=dict(steps='many'))))},
            r'In config\.variants\.b: study\.student\.train\.steps: ',
        ),
        (
            {'variants': dict(b=dict(student=dict(init=dict(method='melt'))))},
            r'In config\.variants\.b: .*init\.method must be one of',
        ),
        (
            {'variants': dict(b=dict(student=dict(train=dict(steps=13))))},
            r"at equal tokens: .* \{'a': 1536, 'b': 1664\}",
        ),
    ],
)
def test_refuses(changes: dict[str, object], message: str):
    with pytest.raises(InputError, match=message):
        build_runs(sweep_of(**changes))


def test_a_study_is_no_sweep():
    with pytest.raises(InputError, match='config has no key'):
        build_runs(get_config())
    config = sweep_of()
    del config.variants
    with pytest.raises(InputError, match='A sweep needs variants in its config'):
        build_runs(config)
