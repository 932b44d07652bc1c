"""A folder that grows, epoch by epoch, and stays what it was."""

import json
import pathlib

import pytest

from distill.logs import Ledger, Logs
from moe.errors import InputError


def add(folder: pathlib.Path, name: str, *texts: str, licence: str | None = 'CC0', end: str = '\n'):
    """Adds a file of conversations."""
    rows = [{'messages': [{'role': 'user', 'content': text}]} for text in texts]
    rows = [row if licence is None else row | {'licence': licence} for row in rows]
    folder.mkdir(exist_ok=True)
    (folder / name).write_text('\n'.join(map(json.dumps, rows)) + end)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    add(tmp_path / 'logs', 'b.jsonl', 'first', 'second')
    return tmp_path / 'logs'


def ledger(folder: pathlib.Path, **logs) -> Ledger:
    return Ledger(folder.parent / 'work' / 'ledger.json', Logs(str(folder), **logs))


def texts(documents) -> list[str]:
    return [document.text.removeprefix('user: ').strip() for document in documents]


def test_new_files_join_at_the_next_epoch_and_the_old_stay(folder: pathlib.Path):
    kept = ledger(folder)
    assert texts(kept.documents(0)) == ['first', 'second']
    add(folder, 'a.jsonl', 'third')
    assert texts(kept.documents(0)) == ['first', 'second']
    # Old files stand first, whatever they are called.
    assert texts(kept.documents(1)) == ['first', 'second', 'third']
    add(folder, 'c.jsonl', 'fourth')
    assert texts(kept.documents(1)) == ['first', 'second', 'third']
    assert list(kept.epoch(1).files) == ['a.jsonl']
    again = ledger(folder)
    assert len(again) == 2
    assert [texts(again.documents(n)) for n in range(3)] == [
        ['first', 'second'],
        ['first', 'second', 'third'],
        ['first', 'second', 'third', 'fourth'],
    ]


def test_an_epoch_without_new_files_is_the_one_before(folder: pathlib.Path):
    kept = ledger(folder)
    assert kept.documents(0) == kept.documents(1)
    assert kept.epoch(1).files == {}


def test_a_file_counts_once_its_last_line_has_ended(folder: pathlib.Path):
    add(folder, 'growing.jsonl', 'half', end='')
    add(folder, '.hidden.jsonl', 'hidden')
    (folder / 'empty.jsonl').touch()
    kept = ledger(folder)
    assert texts(kept.documents(0)) == ['first', 'second']
    add(folder, 'growing.jsonl', 'half', 'whole')
    assert texts(kept.documents(1)) == ['first', 'second', 'half', 'whole']


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda path: path.unlink(), r'b\.jsonl belongs to an epoch that has begun.*it is gone'),
        (lambda path: path.write_text(path.read_text() + '\n'), r'b\.jsonl .*content has changed'),
    ],
)
def test_old_files_that_changed_are_refused_by_name(folder: pathlib.Path, damage, message: str):
    ledger(folder).documents(0)
    damage(folder / 'b.jsonl')
    for epoch in (0, 1):
        with pytest.raises(InputError, match=message):
            ledger(folder).documents(epoch)


def test_rows_without_a_licence_are_left_out_unless_allowed(folder: pathlib.Path):
    add(folder, 'c.jsonl', 'nobody said', licence=None)
    add(folder, 'd.jsonl', 'blank', licence=' ')
    kept = ledger(folder)
    assert texts(kept.documents(0)) == ['first', 'second']
    assert kept.epoch(0).unlicensed == 2
    other = Ledger(folder.parent / 'other.json', Logs(str(folder), allow_unlicensed=True))
    assert texts(other.documents(0)) == ['first', 'second', 'nobody said', 'blank']
    assert other.epoch(0).unlicensed == 0


def test_nothing_licensed_is_refused(tmp_path: pathlib.Path):
    add(tmp_path / 'logs', 'a.jsonl', 'x', licence=None)
    with pytest.raises(InputError, match=r'1 rows have no licence \(see data.allow_unlicensed\)'):
        ledger(tmp_path / 'logs').documents(0)
    assert not (tmp_path / 'work' / 'ledger.json').exists()


def without_second(text: str) -> str | None:
    return None if 'second' in text else text.replace('first', 'somebody')


def test_the_filter_takes_out_and_rewrites(folder: pathlib.Path):
    kept = ledger(folder, keep=without_second, keep_name='names 1.0')
    assert texts(kept.documents(0)) == ['somebody']
    assert kept.epoch(0).filtered == 1


def test_another_filter_is_noticed(folder: pathlib.Path):
    ledger(folder, keep=without_second, keep_name='names 1.0').documents(0)
    with pytest.raises(InputError, match=r"'filter': 'names 1.0'.*received.*'names 2.0'"):
        ledger(folder, keep=without_second, keep_name='names 2.0')
    same_name = ledger(folder, keep=lambda text: text, keep_name='names 1.0')
    with pytest.raises(InputError, match='documents of epoch 0 must be those'):
        same_name.documents(0)
    with pytest.raises(InputError, match='must return a text or None; names returned a int'):
        Ledger(folder / 'x', Logs(str(folder), keep=lambda _: 3, keep_name='names')).documents(0)


def test_what_is_not_a_row_is_named(folder: pathlib.Path):
    (folder / 'x.jsonl').write_text('{"messages": \n')
    with pytest.raises(InputError, match=r'x\.jsonl, line 1: must be one JSON object'):
        ledger(folder).documents(0)


def test_a_damaged_ledger_and_an_empty_folder_are_told(
    tmp_path: pathlib.Path, folder: pathlib.Path
):
    (tmp_path / 'bad.json').write_text('{')
    with pytest.raises(InputError, match=r'bad.json must be a ledger of logs'):
        Ledger(tmp_path / 'bad.json', Logs(str(folder)))
    (tmp_path / 'nothing').mkdir()
    with pytest.raises(InputError, match='holds none'):
        ledger(tmp_path / 'nothing').documents(0)


def test_only_the_writer_begins_an_epoch(folder: pathlib.Path):
    with pytest.raises(RuntimeError, match='epoch 0 has to be begun'):
        ledger(folder).documents(0, write=False)
    ledger(folder).documents(0)
    assert texts(ledger(folder).documents(0, write=False)) == ['first', 'second']
