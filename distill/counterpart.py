"""Rows of a text in two tokenizations: the student's as ever, and the same pieces in a teacher's.

A teacher's row holds, piece by piece, the documents of the student's row. It reads a piece from the
span that the student's first token is in, so it sees the same text, and at most the rest of that
span more. Spans that are cut at an end of a piece, or for which its row has no room, are left out.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from distill.corpus import ParallelTokens, TokenCorpus
from distill.packing import RowLayout, fill_row
from distill.spans import shared_spans, token_lengths
from distill.token_bytes import token_bytes
from distill.tokenizer import Tokenizer
from distill.types import Counterpart
from moe.errors import InputError


def with_parallel(
    corpus: TokenCorpus,
    other: TokenCorpus,
    tokenizers: tuple[Tokenizer, Tokenizer],
    *,
    row_lengths: tuple[int, int],
) -> TokenCorpus:
    """Lays a teacher's tokens beside those of the same documents.

    Args:
        corpus: of the student.
        other: of the teacher.
        tokenizers: the student's and the teacher's.
        row_lengths: tokens of their rows, `T` and `Tt`.

    Returns:
        The student's corpus, with the other one in `parallel`.

    Raises:
        InputError: where a document does not hold the same bytes in both, or `Tt` has no room for
            the text that `T` of the student's tokens hold on average.
    """
    sides = (corpus, other)
    lengths = [
        token_lengths(tokenizer, token_bytes(tokenizer))[side.tokens]
        for tokenizer, side in zip(tokenizers, sides, strict=True)
    ]
    spans = [np.empty(len(side.tokens), np.int32) for side in sides]
    for document in range(len(corpus.lengths)):
        pieces = [slice(*map(int, side.starts[document : document + 2])) for side in sides]
        try:
            found = shared_spans(*(own[piece] for own, piece in zip(lengths, pieces, strict=True)))
        except InputError as error:
            raise InputError(f'Document {document} of the train split: {error}') from error
        for own, piece, numbers in zip(spans, pieces, found, strict=True):
            own[piece] = numbers
    needed = -(-row_lengths[0] * len(other.tokens) // len(corpus.tokens))
    if needed > row_lengths[1]:
        raise InputError(
            f'The {row_lengths[0]} tokens of a row are {needed} of the teacher on average; its '
            f'rows have {row_lengths[1]}. Set teacher_seq_len to {needed + needed // 4} or so, '
            'which leaves room for rows that are longer.'
        )
    return dataclasses.replace(corpus, parallel=ParallelTokens(other, row_lengths[1], *spans))


def parallel_row(corpus: TokenCorpus, layout: RowLayout, row: int) -> dict[str, Any]:
    """Cuts one row from a corpus, as `fill_row` does, and its counterpart where there is one."""
    fields: dict[str, Any] = {**fill_row(corpus, layout, row)}
    if corpus.parallel is None:
        return fields
    return fields | {'counterpart': _counterpart(corpus, corpus.parallel, layout, row)}


def _counterpart(
    corpus: TokenCorpus, parallel: ParallelTokens, layout: RowLayout, row: int
) -> Counterpart:
    other = parallel.corpus
    tokens = np.full(parallel.seq_len, other.pad_id, np.int32)
    labels = np.full(parallel.seq_len, other.pad_id, np.int32)
    segment_ids = np.zeros(parallel.seq_len, np.int32)
    positions = np.zeros(parallel.seq_len, np.int32)
    teacher_spans = np.full(parallel.seq_len, -1, np.int32)
    student_spans = np.full(layout.seq_len, -1, np.int32)
    own_offset = offset = numbered = 0
    first, last = layout.row_bounds[row], layout.row_bounds[row + 1]
    for segment, piece in enumerate(range(first, last), start=1):
        document, size = layout.documents[piece], int(layout.lengths[piece])
        begin, end = (int(corpus.starts[document + i]) for i in (0, 1))
        begin += int(layout.starts[piece])
        own = parallel.own_spans[begin : min(begin + size + 1, end)]
        cut = begin + size + 1 < end and parallel.own_spans[begin + size + 1] == own[-1]
        theirs, start = _document(parallel, int(document))
        at = int(np.searchsorted(theirs, own[0]))
        read = _labelled(theirs, at, int(own[-1]) - cut, parallel.seq_len - offset)
        whole = theirs[at + read] if read else own[0]
        place, labelled = slice(offset, offset + read), own[1:]
        tokens[place] = other.tokens[start + at : start + at + read]
        labels[place] = other.tokens[start + at + 1 : start + at + 1 + read]
        segment_ids[place] = segment
        positions[place] = np.arange(read)
        for spans, found, where in (
            (student_spans, labelled, own_offset),
            (teacher_spans, theirs[at + 1 : at + 1 + read], offset),
        ):
            inside = (found > own[0]) & (found <= whole)
            numbers = numbered + found - own[0] - 1
            spans[where : where + len(found)] = np.where(inside, numbers, -1)
        numbered += int(whole - own[0])
        own_offset += size
        offset += read
    fields: Any = (tokens, labels, segment_ids, positions, student_spans, teacher_spans)
    return Counterpart(*fields)


def _document(parallel: ParallelTokens, document: int) -> tuple[Int[np.ndarray, 'n'], int]:
    """The spans of the teacher's tokens of a document, and where those begin."""
    start, end = map(int, parallel.corpus.starts[document : document + 2])
    return parallel.spans[start:end], start


def _labelled(spans: Int[np.ndarray, 'n'], at: int, last: int, room: int) -> int:
    """Counts the tokens from `at` on that are read to predict all of span `last`, or what fits.

    Only whole spans are predicted: 0 where there is none.
    """
    end = int(np.searchsorted(spans, last, side='right')) - 1
    if end - at > room:
        end = int(np.searchsorted(spans, spans[at + room + 1])) - 1
    first_whole = int(np.searchsorted(spans, spans[at], side='right'))
    return end - at if end >= first_whole else 0
