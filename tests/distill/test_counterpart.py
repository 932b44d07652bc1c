"""Rows of one text in two tokenizations: which pieces they hold, and which spans they share."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_spans import TEXTS, coarse, fine

from distill.corpus import ParallelTokens, TokenCorpus, tokenize
from distill.counterpart import parallel_row, with_parallel
from distill.data import DataConfig, TrainPipeline
from distill.growing import GrowingPipeline
from distill.packing import concat_split, fill_row
from distill.sources import Document
from distill.token_bytes import token_bytes
from distill.tokenizer import ByteTokenizer, Tokenizer
from distill.types import Batch
from moe.errors import InputError


def corpus_of(tokens: list[list[int]]) -> TokenCorpus:
    starts = np.cumsum([0, *map(len, tokens)])
    return TokenCorpus(
        np.concatenate(tokens), starts, pad_id=0, source_sha256='', tokenizer_fingerprint=''
    )


def test_a_row_by_hand() -> None:
    # One document of two rows; spans of (1, 1) tokens (bos), (2, 1), (1, 2), (2, 2), (1, 1) (eos).
    student = corpus_of([[1, 11, 12, 13, 14, 15, 2]])
    teacher = corpus_of([[1, 21, 22, 23, 24, 25, 2]])
    parallel = ParallelTokens(
        teacher, 5, np.array([0, 1, 1, 2, 3, 3, 4]), np.array([0, 1, 2, 2, 3, 3, 4])
    )
    corpus = TokenCorpus(student.tokens, student.starts, 0, '', '', parallel=parallel)
    layout = concat_split(corpus.lengths, np.array([0]), 4)
    first, second = (parallel_row(corpus, layout, row)['counterpart'] for row in (0, 1))
    # Read: 1 11 12 13, labels 11 12 13 14. Token 14 is half of span 3, which nothing compares.
    np.testing.assert_array_equal(first.student_spans, [0, 0, 1, -1])
    np.testing.assert_array_equal(first.tokens, [1, 21, 22, 0, 0])
    np.testing.assert_array_equal(first.labels, [21, 22, 23, 0, 0])
    np.testing.assert_array_equal(first.teacher_spans, [0, 1, 1, -1, -1])
    np.testing.assert_array_equal(first.segment_ids, [1, 1, 1, 0, 0])
    # Read: 14 15 2, labels 15 2. The teacher reads from the start of 14's span.
    np.testing.assert_array_equal(second.student_spans, [-1, 0, -1, -1])
    np.testing.assert_array_equal(second.tokens, [24, 25, 0, 0, 0])
    np.testing.assert_array_equal(second.labels, [25, 2, 0, 0, 0])
    np.testing.assert_array_equal(second.teacher_spans, [-1, 0, -1, -1, -1])
    np.testing.assert_array_equal(second.positions, [0, 1, 0, 0, 0])


def parallel(
    texts: list[str], sides: tuple[Tokenizer, Tokenizer], lengths: tuple[int, int]
) -> TokenCorpus:
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    corpora = [tokenize(documents, side) for side in sides]
    return with_parallel(*corpora, sides, row_lengths=lengths)


@functools.cache
def tables(*sides: Tokenizer) -> list[list[bytes]]:
    # What marks the ends of a document is the same on both sides.
    made = []
    for side in sides:
        table = list(token_bytes(side))
        table[side.bos_id], table[side.eos_id] = b'<bos>', b'<eos>'
        made.append(table)
    return made


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(max_size=25), min_size=1, max_size=4),
    st.integers(4, 12),
    st.integers(0, 12),
    st.booleans(),
)
def test_spans_hold_equal_bytes(texts: list[str], length: int, more: int, swapped: bool) -> None:
    sides = (coarse(), ByteTokenizer()) if swapped else (fine(), coarse())
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    corpora = [tokenize(documents, side) for side in sides]
    mean = -(-length * len(corpora[1].tokens) // len(corpora[0].tokens))
    corpus = with_parallel(*corpora, sides, row_lengths=(length, mean + more))
    layout = concat_split(corpus.lengths, np.arange(len(texts)), length)
    for row in range(layout.num_rows):
        fields = parallel_row(corpus, layout, row)
        its = fields.pop('counterpart')
        plain = fill_row(corpus, layout, row)
        assert all((fields[name] == plain[name]).all() for name in plain)
        views = (
            (its.student_spans, fields['labels'], fields['segment_ids'], fields['mask']),
            (its.teacher_spans, its.labels, its.segment_ids, its.segment_ids > 0),
        )
        count = its.student_spans.max() + 1
        assert count == its.teacher_spans.max() + 1
        for span in range(count):
            held = []
            for (spans, labels, segments, mask), table in zip(views, tables(*sides), strict=True):
                at = np.flatnonzero(spans == span)
                assert (np.diff(at) == 1).all()
                assert mask[at].all()
                held.append((segments[at[0]], b''.join(table[i] for i in labels[at])))
            assert held[0] == held[1]
        assert its.positions[its.segment_ids > 0].size == (its.segment_ids > 0).sum()
        starts = np.flatnonzero(its.positions == 0)[: len(set(its.segment_ids) - {0})]
        for start in starts:
            piece = its.segment_ids == its.segment_ids[start]
            read, labels = its.tokens[piece], its.labels[piece]
            np.testing.assert_array_equal(read[1:], labels[:-1])


def test_all_that_rows_have_room_for_is_compared() -> None:
    sides = (coarse(), ByteTokenizer())
    corpus = parallel(TEXTS, sides, (16, 200))
    layout = concat_split(corpus.lengths, np.arange(len(TEXTS)), 16)
    missed = 0
    for row in range(layout.num_rows):
        fields = parallel_row(corpus, layout, row)
        missed += (fields['mask'] & (fields['counterpart'].student_spans < 0)).sum()
    # Every token ends at a byte: nothing is cut.
    assert missed == 0


def test_batches_have_counterparts() -> None:
    corpus = parallel(TEXTS, (coarse(), ByteTokenizer()), (16, 64))
    config = DataConfig(16, 4, seed=0)
    pipeline = TrainPipeline(corpus, config)
    batch = next(pipeline)
    assert isinstance(batch, Batch)
    assert batch.counterpart is not None
    assert batch.counterpart.tokens.shape == (4, 64)
    assert batch.counterpart.student_spans.shape == batch.tokens.shape
    assert pipeline.fingerprint['teacher_seq_len'] == 64
    grown = next(GrowingPipeline(lambda epoch: corpus, config)).counterpart
    assert grown is not None
    assert grown.teacher_spans.shape == (4, 64)


def test_what_cannot_be_aligned_is_refused() -> None:
    sides = (coarse(), ByteTokenizer())
    with pytest.raises(InputError, match='The 16 tokens of a row are'):
        parallel(TEXTS, sides, (16, 17))
    other = [text + '!' for text in TEXTS]
    corpora = [
        tokenize([Document(str(i), text) for i, text in enumerate(texts)], side)
        for texts, side in zip((TEXTS, other), sides, strict=True)
    ]
    with pytest.raises(InputError, match='Document 0 of the train split: Two tokenizations'):
        with_parallel(*corpora, sides, row_lengths=(16, 100))
