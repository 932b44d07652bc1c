import itertools
import sys
import sysconfig
import types

import pytest

from distill.sources import Document, read_documents, split_documents
from moe.errors import InputError


def write(path, content: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.fixture
def fake_python(tmp_path, monkeypatch):
    root = tmp_path / 'lib'
    write(root / 'b.py', 'b = 1\n')
    write(root / 'a.py', 'a = "é"\n')
    write(root / 'package' / 'c.py', 'c = 1\n')
    write(root / 'package' / 'latin.py', b'# -*- coding: latin-1 -*-\n# \xe9\n')
    write(root / 'package' / '__init__.py', '\n')
    write(root / '_sysconfigdata__linux.py', 'built = {}\n')
    write(root / 'notes.txt', 'not source\n')
    for skipped in ('test', 'package/tests', 'site-packages/x', 'encodings', 'config-3.11-linux'):
        write(root / skipped / 'd.py', 'd = 1\n')
    topics = types.ModuleType('pydoc_data.topics')
    topics.topics = {
        'whole': 'Title\n\nfirst  part\nof it\n\nsecond part\n\nthird',
        'part': 'first part of it\n\nsecond\npart\n\nown',
        'other': 'something else',
    }
    monkeypatch.setitem(sys.modules, 'pydoc_data.topics', topics)
    monkeypatch.setattr(sysconfig, 'get_paths', lambda: {'stdlib': str(root)})


@pytest.mark.usefixtures('fake_python')
def test_python_source_is_library_files_in_order_then_topics_that_do_not_repeat():
    documents = read_documents('python')
    assert documents[:3] == [
        Document('a.py', 'a = "é"\n'),
        Document('b.py', 'b = 1\n'),
        Document('package/c.py', 'c = 1\n'),
    ]
    assert [document.name for document in documents[3:]] == [
        'pydoc_data.topics/whole',
        'pydoc_data.topics/other',
    ]


def test_python_source_of_this_interpreter():
    documents = read_documents('python')
    texts = {document.name: document.text for document in documents}
    assert len(texts) == len(documents) > 300
    assert texts['dataclasses.py'].startswith('import re\nimport sys\n')
    assert 'assert_stmt' in texts['pydoc_data.topics/assert']
    assert not [name for name in texts if name.startswith(('test/', 'encodings/', 'site-pack'))]


def test_files_of_a_glob_are_whole_documents_sorted_by_path(tmp_path):
    long = 'word ' * 2000
    write(tmp_path / 'b.txt', 'second\r\n')
    write(tmp_path / 'a' / 'long.txt', long)
    write(tmp_path / 'c.py', 'x = 1')
    write(tmp_path / 'blank.txt', ' \n')
    documents = read_documents(str(tmp_path / '**' / '*.*'))
    assert documents == [
        Document('a/long.txt', long),
        Document('b.txt', 'second\r\n'),
        Document('c.py', 'x = 1'),
    ]


def test_a_single_text_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    paragraphs = [f'{i} ' * 100 + '\n' + f'{i} ' * 100 for i in range(30)]
    text = '\n\n'.join(paragraphs) + '\n'
    documents = read_documents(write(tmp_path / 'book.txt', text))
    assert ''.join(document.text for document in documents) == text
    assert len(documents) > 10
    for before, after in itertools.pairwise(documents):
        assert before.text.endswith('\n\n')
        assert len(before.text) >= 1024
        assert after.text[0].isdigit()
    assert len({document.name for document in documents}) == len(documents)


def test_a_text_without_blank_lines_is_cut_at_lines_then_words_then_anywhere(tmp_path):
    lines = read_documents(write(tmp_path / 'lines.txt', 'some words\n' * 300))
    assert {document.text[-1] for document in lines} == {'\n'}
    words = read_documents(write(tmp_path / 'words.txt', 'word ' * 1000))
    assert {document.text[-1] for document in words} == {' '}
    solid = read_documents(write(tmp_path / 'solid.txt', 'x' * 3000))
    assert [len(document.text) for document in solid] == [1024, 1024, 952]


def test_a_huge_single_text_has_pieces_of_at_most_64_thousand_characters(tmp_path):
    documents = read_documents(write(tmp_path / 'huge.txt', 'x' * 5_000_000))
    assert max(len(document.text) for document in documents) == 32 * 1024


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('missing.txt', "nothing is at 'missing.txt'"),
        ('*.jsonl', 'Check the path'),
        ('.', r"received the directory '\.'.*\*\*/\*\.txt"),
        ('file.pdf', r"files of kind '\.pdf'; there are \.txt, \.py and \.jsonl"),
        ('blank.txt', 'must hold text'),
    ],
)
def test_sources_without_text_are_refused(tmp_path, monkeypatch, source, message):
    write(tmp_path / 'file.pdf', 'x')
    write(tmp_path / 'blank.txt', '\n\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        read_documents(source)


def documents_of(*texts: str) -> list[Document]:
    return [Document(f'{i}.txt', text) for i, text in enumerate(texts)]


def test_split_has_the_fraction_keeps_the_order_and_loses_nothing():
    documents = documents_of(*(f'text {i}' for i in range(40)))
    train, held_out = split_documents(documents, 0.1, seed=0)
    assert len(held_out) == 4
    assert sorted(train + held_out, key=documents.index) == documents
    assert train == sorted(train, key=documents.index)


def test_split_depends_on_content_and_seed_alone():
    texts = [f'text {i}' for i in range(40)]
    held_out = {d.text for d in split_documents(documents_of(*texts), 0.25, seed=0)[1]}
    reversed_texts = documents_of(*reversed(texts))
    assert {d.text for d in split_documents(reversed_texts, 0.25, seed=0)[1]} == held_out
    assert {d.text for d in split_documents(reversed_texts, 0.25, seed=1)[1]} != held_out


def test_equal_documents_fall_on_the_same_side():
    documents = documents_of(*[f'text {i % 5}' for i in range(50)])
    for seed in range(5):
        train, held_out = split_documents(documents, 0.4, seed)
        assert len(held_out) == 20
        assert not {d.text for d in train} & {d.text for d in held_out}


@pytest.mark.parametrize('fraction', [0.001, 0.999])
def test_neither_side_is_empty(fraction):
    train, held_out = split_documents(documents_of('a', 'b'), fraction, seed=0)
    assert (len(train), len(held_out)) == (1, 1)


def test_split_refuses_one_document_and_bad_fractions():
    with pytest.raises(InputError, match='at least 2 different documents; received 1'):
        split_documents(documents_of('a', 'a'), 0.5, seed=0)
    for fraction in (0, 1, -0.1, float('nan')):
        with pytest.raises(InputError, match='between 0 and 1'):
            split_documents(documents_of('a', 'b'), fraction, seed=0)
