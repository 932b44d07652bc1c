import pytest

from distill.files import file_sha256, whole_directory


def test_the_directory_appears_when_the_block_ends(tmp_path):
    path = tmp_path / 'new' / 'directory'
    with whole_directory(path) as temporary:
        (temporary / 'file').write_text('content')
        assert not path.exists()
    assert (path / 'file').read_text() == 'content'
    assert [entry.name for entry in path.parent.iterdir()] == ['directory']


def test_nothing_is_left_where_the_block_fails(tmp_path):
    with pytest.raises(FileNotFoundError), whole_directory(tmp_path / 'directory') as temporary:
        (temporary / 'missing').read_text()
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_writers_wins(tmp_path):
    with whole_directory(tmp_path / 'directory') as slow:
        (slow / 'file').write_text('slow')
        with whole_directory(tmp_path / 'directory') as fast:
            (fast / 'file').write_text('fast')
    assert (tmp_path / 'directory' / 'file').read_text() == 'fast'
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / 'directory').write_text('mine')
    with pytest.raises(OSError), whole_directory(tmp_path / 'directory'):  # noqa: PT011
        pass
    assert (tmp_path / 'directory').read_text() == 'mine'


def test_sha256_of_a_file(tmp_path):
    (tmp_path / 'file').write_bytes(b'abc')
    expected = 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'
    assert file_sha256(tmp_path / 'file') == expected
