"""What the teacher says, written by a stage: killed, by two processes, and read by a student."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from launching import KILL, MESH, STEPS, TERMINATE, Launcher, metric_rows
from test_processes import run_two

from distill.cache import CachedTargets, read_manifest
from distill.types import Batch

ROWS = STEPS * 8
SAMPLED = ('--config.targets.kind=sampled', '--config.targets.draws=9')
CACHED = ('--config.targets.cached=True', '--config.targets.rows_per_shard=16')


def given_teacher(uninterrupted: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """A workdir whose teacher is trained already."""
    shutil.copytree(uninterrupted / 'teacher', workdir / 'teacher')
    return workdir


@pytest.fixture(scope='module')
def written(
    launcher: Launcher, uninterrupted: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """A workdir with targets, whose teacher is gone but for its name."""
    workdir = given_teacher(uninterrupted, tmp_path_factory.mktemp('targets') / 'study')
    flags = launcher.flags(workdir, '--stages=targets', *SAMPLED, *CACHED, *MESH)
    finished = launcher.run(*flags)
    assert finished.status == 0, finished.output
    for arrays in (workdir / 'teacher' / 'model').glob('*/state'):
        shutil.rmtree(arrays)
    return workdir


def said(workdir: pathlib.Path) -> dict[str, tuple[bytes, bytes]]:
    """Ids and counts of every row that was written, by its key."""
    targets = workdir / 'targets'
    reader = CachedTargets(targets, {})
    reader.verify()
    records = [json.loads(path.read_text()) for path in (targets / 'journal').iterdir()]
    keys = [(r['shard'] * 16 + row, key) for r in records for row, key in enumerate(r['keys'])]
    rows = {}
    for place, key in keys:
        planes = reader._store.read([place])
        # Rows of this text have no padding.
        found = reader._codec.decode(planes, np.ones((1, 16), bool), 9)
        rows[key] = (found.ids.tobytes(), found.counts.tobytes())
    return rows


def test_writes_every_row_of_the_students_batches_once(written: pathlib.Path):
    result = json.loads((written / 'targets' / 'result.json').read_text())
    assert (result['steps'], result['rows'], result['tokens']) == (STEPS, ROWS, ROWS * 16)
    assert len(said(written)) == ROWS
    manifest = read_manifest(written / 'targets')
    assert manifest['teacher']['provenance']['permits_training'] is True
    assert manifest['estimator']['draws'] == 9


def test_killed_again_and_again(
    launcher: Launcher, uninterrupted: pathlib.Path, written: pathlib.Path, tmp_path: pathlib.Path
):
    workdir = given_teacher(uninterrupted, tmp_path / 'study')
    flags = launcher.flags(workdir, '--stages=targets', *SAMPLED, *CACHED, *MESH)
    for shard, signal in ((0, KILL), (1, TERMINATE), (5, KILL)):
        finished = launcher.run(*flags, event=('shard', 'targets', shard, signal))
        if signal == TERMINATE:
            assert finished.status == 0, finished.output
            assert 'Stopped as asked, with the targets of' in finished.output
        else:
            assert finished.status == -KILL, finished.output
            assert not (workdir / 'targets' / 'journal' / f'{shard}.json').exists()
    finished = launcher.run(*flags)
    assert finished.status == 0, finished.output
    assert said(workdir) == said(written)


def test_two_processes_write_what_one_does(
    launcher: Launcher, uninterrupted: pathlib.Path, written: pathlib.Path, tmp_path: pathlib.Path
):
    workdir = given_teacher(uninterrupted, tmp_path / 'study')
    flags = launcher.flags(workdir, '--stages=targets', *SAMPLED, *CACHED, *MESH)
    for finished in run_two(launcher, *flags):
        assert finished.status == 0, finished.output
    two, one = said(workdir), said(written)
    assert two.keys() == one.keys()
    # Sums over another number of devices round differently: a draw may cross to the next id.
    assert sum(two[key] == one[key] for key in one) > 0.9 * ROWS


def test_cached_and_online_targets_give_equal_losses(
    launcher: Launcher, uninterrupted: pathlib.Path, written: pathlib.Path, tmp_path: pathlib.Path
):
    known = ('--config.targets.cached=True', f'--config.targets.path={written / "targets"}')
    rows = {}
    for name, stages, flags in (('cached', 'targets,student', known), ('online', 'student', ())):
        workdir = given_teacher(uninterrupted, tmp_path / name)
        steps = ('--config.student.train.steps=3', '--config.student.optimizer.warmup_steps=1')
        own = launcher.flags(workdir, f'--stages={stages}', *SAMPLED, *flags, *steps, *MESH)
        finished = launcher.run(*own)
        assert finished.status == 0, finished.output
        rows[name] = metric_rows(workdir, 'student')
    for metric in ('teacher_cross_entropy', 'cross_entropy', 'loss'):
        found = [[row[metric] for row in rows[name]] for name in rows]
        assert len(found[0]) == 3
        # Another program rounds the teacher otherwise: a draw may cross to the next id, whereas
        # other draws of this many tokens would differ by some percent.
        np.testing.assert_allclose(*found, rtol=2e-3, err_msg=metric)


def test_damage_is_told_by_the_name_of_the_file(
    launcher: Launcher, written: pathlib.Path, tmp_path: pathlib.Path
):
    workdir = shutil.copytree(written, tmp_path / 'study')
    shard = workdir / 'targets' / 'arrays' / 'ids_0' / 'c' / '2' / '0'
    shard.write_bytes(shard.read_bytes()[:-1])
    finished = launcher.run(*launcher.flags(workdir, '--stages=student', *SAMPLED, *CACHED, *MESH))
    assert finished.status == 2, finished.output
    assert f'{shard} are damaged' in finished.output
    assert 'Traceback' not in finished.output


def test_targets_that_nobody_asked_for_are_not_written(launcher: Launcher, tmp_path: pathlib.Path):
    finished = launcher.run(*launcher.flags(tmp_path, '--stages=targets'))
    assert finished.status == 2, finished.output
    assert '--stages=targets needs config.targets.cached=True' in finished.output


def test_rows_of_other_text_have_no_targets(written: pathlib.Path):
    row = np.ones((1, 16), np.int32)
    with pytest.raises(ValueError, match='1 are not among its 96'):
        CachedTargets(written / 'targets', {}).read(Batch(row, row, row > 0, row, row))
