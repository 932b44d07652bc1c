"""A launch walks its stages, skips what is complete, and takes overrides."""

import glob
import hashlib
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from launching import LONGEST_LAUNCH, MESH, ROOT, STEPS, Launcher, checkpoint_arrays, metric_rows

from distill.checkpoint import read_metadata

TRAINED = ('teacher', 'student', 'control')
STAGES = (*TRAINED, 'evaluate', 'report')


def everything_in(folder: pathlib.Path) -> dict[str, tuple[int, bytes]]:
    """Content and time of change of every file."""
    files = (path for path in sorted(folder.rglob('*')) if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_walks_every_stage(uninterrupted: pathlib.Path):
    results = {
        stage: json.loads((uninterrupted / stage / 'result.json').read_text()) for stage in STAGES
    }
    for stage in TRAINED:
        assert results[stage]['steps'] == STEPS
        assert results[stage]['tokens'] == STEPS * 8 * 16
        rows = metric_rows(uninterrupted, stage)
        assert [row['step'] for row in rows] == list(range(1, STEPS + 1))
        assert rows[-1]['cross_entropy' if stage == 'control' else 'loss'] < rows[0]['loss']
    summary = json.loads((uninterrupted / 'summary.json').read_text())
    assert summary['schema'] == 1
    assert set(summary['models']) == set(TRAINED)
    assert set(summary['stages']) == {*TRAINED, 'evaluate'}
    assert summary['devices']['count'] == 8
    teacher = summary['provenance']['teacher']
    assert (teacher['name'], teacher['permits_training']) == ('trained in this study', True)
    identity = read_metadata(uninterrupted / 'student' / 'checkpoints').metadata['identity']
    assert identity['teacher']['provenance'] == teacher
    assert '<html' in (uninterrupted / 'report.html').read_text()


def test_the_summary_has_every_figure_of_every_model(uninterrupted: pathlib.Path):
    summary = json.loads((uninterrupted / 'summary.json').read_text())
    taught = {'kl_from_teacher', 'top1_agreement'}
    processors = len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count()
    for name, figures in summary['models'].items():
        wanted = {'bits_per_byte', 'cross_entropy', 'accuracy', 'calibration_error'}
        for metric in wanted | (taught if name != 'teacher' else set()):
            assert figures[metric]['low'] <= figures[metric]['value'] <= figures[metric]['high']
        assert figures['parameters']['total'] >= figures['parameters']['active'] > 0
        assert figures['flops_per_token'] > 0
        assert figures['bytes_per_token'] > 0
        # The list price of two virtual CPUs, for as many pairs of them as this machine has.
        price, pairs = figures['usd_per_million_tokens'], math.ceil(processors / 2)
        dollars = 0.08925 * pairs / 3600 / figures['tokens_per_second'] * 1e6
        assert price['value'] == pytest.approx(dollars)
        assert '$0.08925/chip-hour' in price['basis']
        assert '2025' in price['price_source']
    for layer in summary['experts']:
        numbers = ('max_violation', 'entropy', 'drop_fraction', 'dead_experts')
        assert all(np.isfinite(layer[number]) for number in numbers)
    assert len(summary['experts']) == summary['config']['student']['model']['num_layers']
    gain = summary['comparison']['control_minus_student_bits_per_byte']
    control, student = (summary['models'][name] for name in ('control', 'student'))
    difference = control['bits_per_byte']['value'] - student['bits_per_byte']['value']
    assert gain['value'] == pytest.approx(difference)
    head = subprocess.run(
        ['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    assert (summary['git_commit'] or '').startswith(head)
    assert summary['versions']['jax'] == jax.__version__


def test_what_was_trained_on_is_not_held_out(
    launcher: Launcher, uninterrupted: pathlib.Path, tmp_path: pathlib.Path
):
    """As where the text was changed between two stages, and is split in another way."""
    workdir = shutil.copytree(uninterrupted, tmp_path / 'study')
    (workdir / 'evaluate' / 'result.json').unlink()
    record = workdir / 'student' / 'documents.json'
    texts = [pathlib.Path(path).read_bytes() for path in glob.glob(launcher.source)]
    seen = sorted(hashlib.sha256(text).hexdigest()[:16] for text in texts)
    record.write_text(json.dumps({'sha256': seen}))
    finished = launcher.run(*launcher.flags(workdir, '--stages=evaluate', *MESH))
    assert finished.status == 2
    assert f'held-out documents were training text of the model in {workdir}' in finished.output


def test_student_and_control_differ_by_the_teacher_alone(uninterrupted: pathlib.Path):
    student, control = (checkpoint_arrays(uninterrupted, name) for name in ('student', 'control'))
    assert student.keys() == control.keys()
    kernel = 'params/layer_0/moe/router/kernel'
    assert not np.array_equal(student[kernel], control[kernel])
    first = [metric_rows(uninterrupted, name)[0] for name in ('student', 'control')]
    # The same parameters and the same first batch: the same cross-entropy before any update.
    assert first[0]['cross_entropy'] == first[1]['cross_entropy']


def test_complete_stages_are_skipped(launcher: Launcher, uninterrupted: pathlib.Path):
    before = everything_in(uninterrupted)
    finished = launcher.run(*launcher.flags(uninterrupted, *MESH))
    assert finished.status == 0, finished.output
    assert everything_in(uninterrupted) == before


def test_a_student_is_evaluated_before_its_control_and_with_it_once_that_is_there(
    launcher: Launcher, uninterrupted: pathlib.Path, tmp_path: pathlib.Path
):
    workdir = shutil.copytree(uninterrupted, tmp_path / 'study')
    control = (workdir / 'control').rename(tmp_path / 'control')
    (workdir / 'evaluate' / 'result.json').unlink()
    finished = launcher.run(*launcher.flags(workdir, '--stages=student,evaluate', *MESH))
    assert finished.status == 0, finished.output
    alone = json.loads((workdir / 'evaluate' / 'result.json').read_text())
    assert set(alone['models']) == {'teacher', 'student'}
    assert 'control_minus_student_bits_per_byte' not in alone['comparison']
    control.rename(workdir / 'control')
    (workdir / 'summary.json').write_text(json.dumps({'models': alone['models']}))
    finished = launcher.run(*launcher.flags(workdir, *MESH))
    assert finished.status == 0, finished.output
    summaries = [json.loads((w / 'summary.json').read_text()) for w in (workdir, uninterrupted)]
    now, before = (summary['comparison'] for summary in summaries)
    gain = 'control_minus_student_bits_per_byte'
    assert now[gain] == pytest.approx(before[gain])


def test_picked_stages_alone_are_run(launcher: Launcher, tmp_path: pathlib.Path):
    dense = '--config.student.model.moe.dispatch=dense'
    finished = launcher.run(*launcher.flags(tmp_path, '--stages=control', dense), devices=1)
    assert finished.status == 0, finished.output
    assert (tmp_path / 'control' / 'result.json').exists()
    assert not [name for name in STAGES if name != 'control' and (tmp_path / name).exists()]


def test_overrides_and_a_teacher_from_a_checkpoint(
    launcher: Launcher, uninterrupted: pathlib.Path, tmp_path: pathlib.Path
):
    # One device, where the teacher was trained on eight.
    finished = launcher.run(
        *launcher.flags(
            tmp_path,
            '--config.student.model.num_layers=3',
            '--config.student.model.scan_layers=True',
            '--config.student.model.moe.dispatch=dense',
            '--config.student.train.steps=3',
            '--config.teacher.source=checkpoint',
            f'--config.teacher.checkpoint={uninterrupted / "teacher"}',
            '--stages=teacher,student',
        ),
        devices=1,
    )
    assert finished.status == 0, finished.output
    kernel = checkpoint_arrays(tmp_path, 'student', 3)['params/group_0/layer_0/moe/router/kernel']
    assert kernel.shape == (3, 16, 4)
    rows = metric_rows(tmp_path, 'student')
    assert [row['step'] for row in rows] == [1, 2, 3]
    # The teacher of another folder, not one of chance: its divergence is finite and not zero.
    assert 0 < rows[0]['forward_kl'] < 10


def test_help(launcher: Launcher):
    with launcher.command('--help') as command:
        output, _ = command.communicate(timeout=LONGEST_LAUNCH)
    assert '--workdir' in output
    assert 'python -m experiments.launch --config=' in output


def test_interrupted_it_says_so_in_a_line():
    program = (
        'from experiments import cli\ndef main():\n    raise KeyboardInterrupt\ncli.run(main)\n'
    )
    ended = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert ended.returncode == 130
    assert ended.stderr == 'Interrupted. What was complete is intact.\n'
