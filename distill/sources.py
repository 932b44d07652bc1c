"""Text from files, or from the running Python itself, as named documents; and their split."""

import dataclasses
import glob
import hashlib
import math
import os
import pathlib
import sysconfig
from collections.abc import Iterator, Sequence

from distill.formats import read_file
from moe.errors import InputError

SKIPPED_DIRECTORIES = (
    *('__pycache__', 'dist-packages', 'encodings', 'idle_test', 'pydoc_data', 'site-packages'),
    *('test', 'tests'),
)
SMALLEST_PIECE, LARGEST_PIECE, PIECES = 1024, 32 * 1024, 64


@dataclasses.dataclass(frozen=True)
class Document:
    """A text that is never mixed with another: the unit of splitting, packing and evaluation.

    Attributes:
        name: where it came from, unique within its source.
        text: valid unicode (no lone surrogates), not blank.
    """

    name: str
    text: str


def read_documents(source: str, *, field: str = 'text') -> list[Document]:
    """Reads every document of a source, in an order that depends on nothing but the source.

    Args:
        source: 'python', or a path or glob (`**` descends) of files of these kinds, mixed at will:
            `.txt`, `.py`: a document a file. A `.txt` that is the only file is cut into about 64
            documents of 1 to 32 thousand characters each, at blank lines where there are any, so
            that it too can be split into train and held-out.
            `.jsonl`: a document a line. `.parquet`: a document a row. `.array_record` or
            `.arrayrecord`: a document a record, which is a JSON object or else plain utf-8 text.
            'python' is the standard library's source files as they lie in the running Python, and
            the language reference in `pydoc_data.topics`, a document each. Left out are tests,
            installed packages, files that are not utf-8, what was generated when this Python was
            built, the near-identical tables under `encodings`, and topics that mostly repeat longer
            ones: copies on both sides of a split would reward memory.
        field: of a JSON object or parquet row: a string, or OpenAI-style messages (a list of
            objects with `role` and `content`), each rendered as `role: content` and a blank line;
            or a text in which each `{name}` stands for that of a field.

    Returns:
        Documents in order of path, then of position. Blank texts are left out.

    Raises:
        InputError: the source has no file or no text, or a file cannot be read as described.
    """
    documents = _python_documents() if source == 'python' else _file_documents(source, field)
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise InputError(
            f'The source {source!r} must hold text; all of its documents are blank. '
            'Check that its files were written completely.'
        )
    return documents


def split_documents(
    documents: Sequence[Document], held_out_fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Splits documents into train and held-out by a hash of their content.

    Documents of equal content fall on the same side, and neither names nor order matter.

    Args:
        documents: at least two different ones.
        held_out_fraction: share of the different documents to hold out, in (0, 1); at least one
            document is held out and at least one is kept.
        seed: picks another split.

    Returns:
        Train and held-out documents, each in the order given.
    """
    if not 0 < held_out_fraction < 1:
        raise InputError(
            f'held_out_fraction must be between 0 and 1, exclusive; received {held_out_fraction!r}.'
        )
    digests = [
        hashlib.sha256(f'{seed}\0{document.text}'.encode()).digest() for document in documents
    ]
    ranked = sorted(set(digests))
    if len(ranked) < 2:
        raise InputError(
            'A split into train and held-out needs at least 2 different documents; received '
            f'{len(ranked)}. Give more files, or a longer text.'
        )
    count = min(max(1, round(held_out_fraction * len(ranked))), len(ranked) - 1)
    held_out_digests = set(ranked[:count])
    train, held_out = [], []
    for document, digest in zip(documents, digests, strict=True):
        (held_out if digest in held_out_digests else train).append(document)
    return train, held_out


def _python_documents() -> Iterator[Document]:
    root = sysconfig.get_paths()['stdlib']
    for directory, children, files in os.walk(root):
        children[:] = sorted(
            child
            for child in children
            if child not in SKIPPED_DIRECTORIES and not child.startswith('config-')
        )
        for file in sorted(files):
            if file.endswith('.py') and not file.startswith('_sysconfig'):
                path = pathlib.Path(directory, file)
                try:
                    text = path.read_bytes().decode()
                except UnicodeDecodeError:
                    continue
                yield Document(path.relative_to(root).as_posix(), text)
    yield from _language_reference()


def _language_reference() -> Iterator[Document]:
    """Gives the topics of `help()`, without those whose paragraphs mostly stand in longer ones."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = {' '.join(paragraph.split()) for paragraph in topics[name].split('\n\n')}
        repeated = sum(map(len, paragraphs & seen))
        if 2 * repeated < sum(map(len, paragraphs)):
            seen |= paragraphs
            yield Document(f'pydoc_data.topics/{name}', topics[name])


def _file_documents(source: str, field: str) -> Iterator[Document]:
    paths = _matching_files(source)
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    for path in paths:
        name = os.path.relpath(path, common or '.')
        for suffix, text in read_file(path, field):
            if len(paths) == 1 and path.endswith('.txt'):
                yield from _pieces(name, text)
            else:
                yield Document(name + suffix, text)


def _matching_files(source: str) -> list[str]:
    pattern = os.path.expanduser(source)
    if os.path.isfile(pattern):
        return [pattern]
    if os.path.isdir(pattern):
        raise InputError(
            f'data.source must be a file or a glob; received the directory {source!r}. '
            f'Name its files, such as {os.path.join(source, "**", "*.txt")!r}.'
        )
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        raise InputError(
            f"data.source must be 'python' or match a file; nothing is at {source!r} "
            f'(looked from {os.getcwd()}). Check the path, and quote globs in the shell.'
        )
    return paths


def _pieces(name: str, text: str) -> Iterator[Document]:
    """Cuts one text so that the pieces, joined, are the text again."""
    size = min(max(math.ceil(len(text) / PIECES), SMALLEST_PIECE), LARGEST_PIECE)
    start = 0
    while start < len(text):
        stop = _boundary(text, start + size, size)
        yield Document(f'{name}#{start}', text[start:stop])
        start = stop


def _boundary(text: str, start: int, reach: int) -> int:
    """Finds the best place to cut in `[start, start + reach)`: a blank line, a line, a word."""
    if start >= len(text):
        return len(text)
    for mark in ('\n\n', '\n', ' '):
        at = text.find(mark, start, start + reach)
        if at >= 0:
            return at + len(mark)
    return start
