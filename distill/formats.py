"""The kinds of file that text comes in, each read as (suffix of a document's name, text)."""

import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from moe.errors import InputError

Texts = Iterator[tuple[str, str]]

# Of a text that is made of several fields.
_NAMED = re.compile(r'\{(\w+)\}')


def read_file(path: str, field: str) -> Texts:
    """Reads the texts of one file, by its extension.

    Args:
        path: of a `.txt` or `.py` (one text), or a `.jsonl`, `.parquet`, `.array_record` or
            `.arrayrecord` (a text for each record).
        field: of a record, see `record_text`.

    Returns:
        Pairs of what to add to the file's name to name the text, and the text.

    Raises:
        InputError: another extension, or content that is not what the extension says; it names the
            line, row, record or byte.
    """
    extension = os.path.splitext(path)[1]
    if extension in ('.txt', '.py'):
        return iter([('', _read_text(path))])
    readers = {
        '.jsonl': _jsonl,
        '.parquet': _parquet,
        '.array_record': _array_record,
        '.arrayrecord': _array_record,
    }
    if extension not in readers:
        raise InputError(
            f'{path}: cannot read files of kind {extension!r}; there are .txt, .py and '
            f'{", ".join(readers)}. Convert the file, or narrow the glob.'
        )
    return readers[extension](path, field)


def _read_text(path: str) -> str:
    content = pathlib.Path(path).read_bytes()
    try:
        text = content.decode()
        offset = content.find(b'\0')
    except UnicodeDecodeError as error:
        text, offset = '', error.start
    if offset >= 0:
        raise InputError(
            f'{path}: must be utf-8 text; byte {offset} is 0x{content[offset]:02x}, which is not. '
            'Convert the file to utf-8, or leave it out of data.source.'
        )
    return text


def _jsonl(path: str, field: str) -> Texts:
    for suffix, record, where in jsonl_records(path):
        yield suffix, record_text(record, field, where)


def jsonl_records(path: str) -> Iterator[tuple[str, Any, str]]:
    """Reads a `.jsonl` file.

    Args:
        path: of the file.

    Returns:
        For each line that is not blank: what names it after the file's name, what it holds, and
        where it stands, for messages.

    Raises:
        InputError: a line is not JSON; names it.
    """
    for number, line in enumerate(_read_text(path).split('\n'), start=1):
        if line.strip():
            where = f'{path}, line {number}'
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(
                    f'{where}: must be one JSON object; {error}. Mend or remove the line.'
                ) from error
            yield f':{number}', record, where


def _parquet(path: str, field: str) -> Texts:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f'{path}: reading parquet needs pyarrow, which is not installed; it comes with the '
            "extra 'parquet': pip install 'fractional[parquet]'."
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = _NAMED.findall(field) or [field]
        for column in columns:
            _require_field(file.schema_arrow.names, column, path)
        number = 0
        for batch in file.iter_batches(columns=columns):
            for record in batch.to_pylist():
                yield f':{number}', record_text(record, field, f'{path}, row {number}')
                number += 1
    except pyarrow.ArrowException as error:
        raise InputError(
            f'{path}: not a readable parquet file; {error}. Fetch it again.'
        ) from error


def _array_record(path: str, field: str) -> Texts:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(path)
        # A file that was cut off opens with no records and this flag alone.
        problem = '' if reader.ok() else 'its end is missing'
        records = reader.read_all() if reader.ok() else []
    except (RuntimeError, ValueError, IndexError) as error:
        problem, records = str(error), []
    if problem:
        raise InputError(
            f'{path}: not a readable ArrayRecord file; {problem}. Its writer may have been killed; '
            'write or fetch it again.'
        )
    for number, record in enumerate(records):
        where = f'{path}, record {number}'
        try:
            text = record.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f'{where}: must be utf-8 text or JSON; byte {error.start} is neither.'
            ) from error
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if isinstance(value, dict):
            text = record_text(value, field, where)
        yield f':{number}', text


def _require_field(names: Sequence[str], field: str, where: str) -> None:
    if field not in names:
        raise InputError(
            f'{where}: the field {field!r} is missing; there are {sorted(names)}. '
            'Name one of them in data.field.'
        )


def record_text(record: Any, field: str, where: str) -> str:
    """Returns the text of a record's field; messages are rendered.

    Args:
        record: a JSON object.
        field: that holds a string or OpenAI-style messages; or a text in which each `{name}` stands
            for that of a field, such as 'Question: {question}'.
        where: what the record is called in an error.

    Raises:
        InputError: the record has no such field, or no text in it.
    """
    if not isinstance(record, dict):
        raise InputError(
            f'{where}: must be a JSON object with the field {field!r}; received a '
            f'{type(record).__name__}.'
        )
    if _NAMED.search(field):
        return _NAMED.sub(lambda named: record_text(record, named[1], where), field)
    _require_field(list(record), field, where)
    value = record[field]
    text = message_text(value, where) if isinstance(value, list) else value
    if not isinstance(text, str):
        raise InputError(
            f'{where}: the field {field!r} must be a string or a list of messages; received a '
            f'{type(value).__name__}. Mend or remove the record, or name another data.field.'
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f'{where}: character {error.start} is half of a surrogate pair, which is no text. '
            'Mend or remove the record.'
        ) from error
    return text


def message_text(messages: list, where: str) -> str:
    """Renders OpenAI-style messages: each as `role: content` and a blank line.

    Args:
        messages: objects with `role` and `content`, which is text or a list of parts with `text`.
        where: what they are called in an error.

    Raises:
        InputError: naming the message that has no role or no text.
    """
    rendered = text_messages(messages, where)
    return ''.join(f'{message["role"]}: {message["content"]}\n\n' for message in rendered)


def text_messages(messages: list, where: str) -> list[dict[str, Any]]:
    """Returns OpenAI-style messages with content that is text: parts are put together.

    Args, errors: as `message_text`.
    """
    return list(_text_messages(messages, where))


def _text_messages(messages: list, where: str) -> Iterator[dict[str, Any]]:
    for number, message in enumerate(messages):
        role = message.get('role') if isinstance(message, dict) else None
        content = message.get('content') if isinstance(message, dict) else None
        if isinstance(content, list):
            parts = [part.get('text') if isinstance(part, dict) else None for part in content]
            content = None if None in parts else ''.join(map(str, parts))
        if not (isinstance(role, str) and isinstance(content, str)):
            raise InputError(
                f'{where}: message {number} must have a role and text content; received '
                f'{str(message)[:80]}. Mend or remove the record.'
            )
        yield message | {'content': content}
