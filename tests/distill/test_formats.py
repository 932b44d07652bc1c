import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from distill.formats import read_file
from moe.errors import InputError

MESSAGES = [
    {'role': 'user', 'content': 'Hi?'},
    {'role': 'assistant', 'content': [{'type': 'text', 'text': 'He'}, {'text': 'llo.'}]},
]
RENDERED = 'user: Hi?\n\nassistant: Hello.\n\n'


def write(path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_records(path, records: list[bytes]) -> str:
    writer = ArrayRecordWriter(str(path), 'group_size:1')
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


def read(path: str, field: str = 'text') -> list[tuple[str, str]]:
    return list(read_file(path, field))


def test_text_is_read_as_it_is(tmp_path):
    assert read(write(tmp_path / 'a.txt', 'é\r\n\n漢 ')) == [('', 'é\r\n\n漢 ')]
    assert read(write(tmp_path / 'a.py', 'x = 1\n')) == [('', 'x = 1\n')]


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'abc\xff\xfe', r'byte 3 is 0xff'),
        ('é'.encode() + b'\x80', r'byte 2 is 0x80'),
        (b'plain\0text', r'byte 5 is 0x00'),
    ],
)
def test_binary_junk_names_file_and_byte(tmp_path, content, message):
    path = write(tmp_path / 'junk.txt', content)
    with pytest.raises(InputError, match=rf'junk\.txt: must be utf-8 text; {message}'):
        read(path)


def test_jsonl_reads_a_field_and_skips_blank_lines(tmp_path):
    lines = ['{"text": "a\\nb", "id": 1}', '', '{"text": "é\u2028", "id": 2}', '']
    path = write(tmp_path / 'a.jsonl', '\n'.join(lines))
    assert read(path) == [(':1', 'a\nb'), (':3', 'é\u2028')]


def test_messages_are_rendered(tmp_path):
    path = write(tmp_path / 'chat.jsonl', json.dumps({'messages': MESSAGES}))
    assert read(path, 'messages') == [(':1', RENDERED)]


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('{"text": "cut', 'must be one JSON object; Unterminated string'),
        ('["text"]', "must be a JSON object with the field 'text'; received a list"),
        ('{"id": 1, "body": ""}', r"'text' is missing; there are \['body', 'id'\].*data.field"),
        ('{"text": 3}', 'must be a string or a list of messages; received a int'),
        ('{"text": null}', 'received a NoneType'),
        ('{"text": "\\ud800"}', 'character 0 is half of a surrogate pair'),
        ('{"text": [{"role": "user"}]}', 'message 0 must have a role and text content'),
        ('{"text": ["hello"]}', 'message 0 must have a role'),
        ('{"text": [{"role": "user", "content": [{"image": 1}]}]}', 'message 0 must have a role'),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = write(tmp_path / 'a.jsonl', '{"text": "fine"}\n' + line + '\n')
    with pytest.raises(InputError, match=rf'a\.jsonl, line 2: .*{message}'):
        read(path)


def test_parquet_reads_strings_and_messages(tmp_path):
    plain = [{'role': 'user', 'content': 'Hi?'}]
    table = pyarrow.table({'body': ['a', 'é'], 'chat': [plain, plain * 2]})
    pyarrow.parquet.write_table(table, tmp_path / 'a.parquet', row_group_size=1)
    path = str(tmp_path / 'a.parquet')
    assert read(path, 'body') == [(':0', 'a'), (':1', 'é')]
    assert read(path, 'chat') == [(':0', 'user: Hi?\n\n'), (':1', 'user: Hi?\n\n' * 2)]


TEMPLATE = 'Q: {question}\nA: {answer} {0'


def test_a_template_of_fields_is_filled_in(tmp_path):
    # What a field holds is no template itself.
    rows = [{'question': 'two and {answer}?', 'answer': '4'}, {'question': 'é', 'answer': ''}]
    filled = ['Q: two and {answer}?\nA: 4 {0', 'Q: é\nA:  {0']
    path = write(tmp_path / 'a.jsonl', '\n'.join(map(json.dumps, rows)))
    assert read(path, TEMPLATE) == [(':1', filled[0]), (':2', filled[1])]
    path = str(tmp_path / 'a.parquet')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read(path, TEMPLATE) == [(':0', filled[0]), (':1', filled[1])]
    with pytest.raises(InputError, match="the field 'grade' is missing"):
        read(path, '{question} {grade}')
    path = write(tmp_path / 'b.jsonl', '{"question": "?", "answer": 3}')
    with pytest.raises(InputError, match="line 1: the field 'answer' must be a string"):
        read(path, TEMPLATE)


def test_parquet_errors(tmp_path, monkeypatch):
    path = str(tmp_path / 'a.parquet')
    pyarrow.parquet.write_table(pyarrow.table({'body': ['a', None], 'id': [1, 2]}), path)
    with pytest.raises(InputError, match=r"'text' is missing; there are \['body', 'id'\]"):
        read(path)
    with pytest.raises(InputError, match=r'a\.parquet, row 1: .*received a NoneType'):
        read(path, 'body')
    with pytest.raises(InputError, match=r'junk\.parquet: not a readable parquet file'):
        read(write(tmp_path / 'junk.parquet', 'no parquet at all'))
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(InputError, match=r"pip install 'fractional\[parquet\]'"):
        read(path, 'body')


@pytest.mark.parametrize('extension', ['array_record', 'arrayrecord'])
def test_array_records_are_text_or_json(tmp_path, extension):
    records = ['plain é'.encode(), b'{"text": "field"}', b'123', b'{not json}']
    path = write_records(tmp_path / f'a.{extension}', records)
    assert read(path) == [(':0', 'plain é'), (':1', 'field'), (':2', '123'), (':3', '{not json}')]


def test_array_record_errors(tmp_path):
    path = write_records(tmp_path / 'a.array_record', [b'fine', b'{"id": 1}'])
    with pytest.raises(InputError, match=r"record 1: the field 'text' is missing"):
        read(path)
    path = write_records(tmp_path / 'b.array_record', [b'fine', b'ab\xff'])
    with pytest.raises(InputError, match=r'b\.array_record, record 1: .*byte 2'):
        read(path)


@pytest.mark.parametrize('size', [0, 40, 65536, 131071])
def test_a_cut_off_array_record_is_refused(tmp_path, size):
    path = tmp_path / 'a.array_record'
    write_records(path, [b'fine'])
    assert len(path.read_bytes()) > size
    cut = write(tmp_path / 'cut.array_record', path.read_bytes()[:size])
    with pytest.raises(InputError, match=r'cut\.array_record: not a readable ArrayRecord'):
        read(cut)


def test_an_array_record_without_records_has_no_texts(tmp_path):
    assert read(write_records(tmp_path / 'none.array_record', [])) == []
