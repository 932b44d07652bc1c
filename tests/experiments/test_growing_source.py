"""A study of a folder of logs that grows while it runs, and is killed."""

import json
import pathlib
import random
import shutil

import pytest
from launching import KILL, Launcher, assert_bitwise_equal, checkpoint_arrays, metric_rows

WORDS = ('what', 'does', 'a', 'student', 'ask', 'next', 'and', 'why')
FIELD = '--config.data.field=messages'


def add(folder: pathlib.Path, name: str, seed: int, **fields: str) -> None:
    """Adds a file of five short conversations."""
    folder.mkdir(exist_ok=True)
    generator = random.Random(seed)
    rows = [
        {'messages': [{'role': 'user', 'content': ' '.join(generator.choices(WORDS, k=30))}]}
        | fields
        for _ in range(5)
    ]
    (folder / name).write_text(''.join(json.dumps(row) + '\n' for row in rows))


def flags(launcher: Launcher, logs: pathlib.Path, workdir: pathlib.Path, *more: str) -> list[str]:
    ours = [flag for flag in launcher.flags(workdir, *more) if 'data.source' not in flag]
    return [*ours, f'--config.data.source={logs}', FIELD, '--stages=teacher']


@pytest.fixture(scope='module')
def killed(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with logs, and a workdir: killed, grown, and gone on to its end."""
    folder = tmp_path_factory.mktemp('growing')
    add(folder / 'logs', 'monday.jsonl', 0, licence='CC0')
    argv = flags(launcher, folder / 'logs', folder / 'study')
    finished = launcher.run(*argv, event=('step', 'teacher', 5, KILL), devices=1)
    assert finished.status == -KILL, finished.output
    add(folder / 'logs', 'tuesday.jsonl', 1, licence='CC0')
    finished = launcher.run(*argv, devices=1)
    assert finished.status == 0, finished.output
    return folder


def epochs(workdir: pathlib.Path) -> list[dict]:
    return json.loads((workdir / 'ledger.json').read_text())['epochs']


def test_new_files_join_at_a_later_epoch(killed: pathlib.Path):
    files = [list(epoch['files']) for epoch in epochs(killed / 'study')]
    assert files[0] == ['monday.jsonl']
    joined = files.index(['tuesday.jsonl'])
    assert joined > 0
    assert all(not names for number, names in enumerate(files) if number not in (0, joined))


def test_a_run_of_the_same_ledger_is_the_same_run(
    launcher: Launcher, killed: pathlib.Path, tmp_path: pathlib.Path
):
    """Uninterrupted, with both files there from the start: the ledger says when each joined."""
    tmp_path.joinpath('study').mkdir()
    shutil.copy(killed / 'study' / 'ledger.json', tmp_path / 'study')
    finished = launcher.run(*flags(launcher, killed / 'logs', tmp_path / 'study'), devices=1)
    assert finished.status == 0, finished.output
    assert_bitwise_equal(
        checkpoint_arrays(tmp_path / 'study', 'teacher'),
        checkpoint_arrays(killed / 'study', 'teacher'),
    )
    assert metric_rows(tmp_path / 'study', 'teacher') == metric_rows(killed / 'study', 'teacher')
    assert epochs(tmp_path / 'study') == epochs(killed / 'study')


def test_a_changed_log_is_refused_by_name(
    launcher: Launcher, killed: pathlib.Path, tmp_path: pathlib.Path
):
    study = shutil.copytree(killed / 'study', tmp_path / 'study')
    (study / 'teacher' / 'result.json').unlink()
    monday = killed / 'logs' / 'monday.jsonl'
    content = monday.read_text()
    add(killed / 'logs', 'monday.jsonl', 7, licence='CC0')
    try:
        finished = launcher.run(*flags(launcher, killed / 'logs', study), devices=1)
    finally:
        monday.write_text(content)
    assert finished.status == 2, finished.output
    assert 'monday.jsonl belongs to an epoch that has begun' in finished.output
    assert 'Traceback' not in finished.output


def test_logs_without_a_licence_are_not_trained_on(launcher: Launcher, tmp_path: pathlib.Path):
    add(tmp_path / 'logs', 'monday.jsonl', 0)
    finished = launcher.run(*flags(launcher, tmp_path / 'logs', tmp_path / 'study'))
    assert finished.status == 2, finished.output
    assert '5 rows have no licence' in finished.output
    assert not (tmp_path / 'study').exists()


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('--config.data.filter=nobody', "'fractional.filters' that one installed package declares"),
        ('--config.data.filter=os:system', "received 'os:system', which 0 declare"),
    ],
)
def test_a_config_cannot_name_code(
    launcher: Launcher, killed: pathlib.Path, tmp_path: pathlib.Path, flag: str, message: str
):
    argv = flags(launcher, killed / 'logs', tmp_path / 'study', flag)
    finished = launcher.run(*argv, devices=1)
    assert finished.status == 2, finished.output
    assert message in finished.output
