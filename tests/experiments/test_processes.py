"""Two processes of four devices are one process of eight, stopped on the way or not."""

import json
import pathlib
import shutil
import socket

import numpy as np
import pytest
from launching import MESH, TERMINATE, Finished, Launcher, checkpoint_arrays, metric_rows

from distill.checkpoint import complete_steps


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def run_two(launcher: Launcher, *argv: str, event=None) -> list[Finished]:
    """Launches two processes of four devices; the event is of the second alone."""
    together = (f'--coordinator_address=127.0.0.1:{free_port()}', '--num_processes=2')
    started = [
        launcher.start(
            *argv,
            *together,
            f'--process_id={process}',
            devices=4,
            event=event if process == 1 else None,
        )
        for process in range(2)
    ]
    return [launcher.wait(one) for one in started]


@pytest.fixture(scope='module')
def by_two(
    launcher: Launcher, uninterrupted: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """The study as two processes run it, one of them asked to stop on the way.

    The control, trained as the teacher is, is given.
    """
    workdir = tmp_path_factory.mktemp('two') / 'study'
    shutil.copytree(uninterrupted / 'control', workdir / 'control')
    argv = launcher.flags(workdir, *MESH)
    for finished in run_two(launcher, *argv, event=('step', 'teacher', 2, TERMINATE)):
        assert finished.status == 0, finished.output
        # They agree every eighth step.
        assert 'Stopped as asked, saved at step 8.' in finished.output
    assert complete_steps(workdir / 'teacher' / 'checkpoints')[-1] == 8
    assert not (workdir / 'teacher' / 'result.json').exists()
    for finished in run_two(launcher, *argv):
        assert finished.status == 0, finished.output
    return workdir


@pytest.mark.parametrize('stage', ['teacher', 'student'])
def test_train_to_the_same_parameters(
    uninterrupted: pathlib.Path, by_two: pathlib.Path, stage: str
):
    """Not bit for bit: sums over processes are made in another order than sums within one."""
    one, two = (checkpoint_arrays(workdir, stage) for workdir in (uninterrupted, by_two))
    assert one.keys() == two.keys()
    for name in one:
        rounding = 1e-5 * np.abs(one[name]).max()
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=rounding, err_msg=name)


def test_evaluate_to_the_same_figures(uninterrupted: pathlib.Path, by_two: pathlib.Path):
    one, two = (
        json.loads((workdir / 'summary.json').read_text()) for workdir in (uninterrupted, by_two)
    )
    assert (one['devices']['processes'], two['devices']['processes']) == (1, 2)
    for name in ('teacher', 'student', 'control'):
        for metric in ('bits_per_byte', 'cross_entropy', 'accuracy'):
            for bound in ('value', 'low', 'high'):
                expected = one['models'][name][metric][bound]
                assert two['models'][name][metric][bound] == pytest.approx(expected, rel=1e-4)
    expected = one['models']['student']['kl_from_teacher']['value']
    assert two['models']['student']['kl_from_teacher']['value'] == pytest.approx(expected, rel=1e-3)
    assert one['experts'][0]['entropy'] == pytest.approx(two['experts'][0]['entropy'], rel=1e-3)


def test_one_writes(by_two: pathlib.Path):
    assert not list(by_two.rglob('*.tmp'))
    for stage in ('teacher', 'student'):
        assert [row['step'] for row in metric_rows(by_two, stage)] == list(range(1, 13))


def test_half_given_flags(launcher: Launcher, tmp_path: pathlib.Path):
    finished = launcher.run(*launcher.flags(tmp_path, '--num_processes=2'))
    assert finished.status == 2
    assert 'coordinator_address, process_id missing' in finished.output
    assert 'Traceback' not in finished.output
