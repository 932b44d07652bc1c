import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.corpus import TokenCorpus, tokenize
from distill.packing import concat_split, fill_row, first_fit, one_a_row
from distill.sources import Document
from distill.tokenizer import ByteTokenizer

PACKINGS = {'concat_split': concat_split, 'first_fit': first_fit}
BOS, EOS, PAD = 256, 257, 258


def numbered_corpus(lengths: list[int]) -> TokenCorpus:
    """Every token is its own place in the corpus, so that nothing can hide."""
    starts = np.cumsum([0, *lengths])
    return TokenCorpus(np.arange(starts[-1]), starts, -1, '', '')


def corpus_of(*texts: str) -> TokenCorpus:
    return tokenize([Document('', text) for text in texts], ByteTokenizer())


def check_rows(rows: list[dict], expected: list[dict]) -> None:
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        mask = np.array(wanted['mask'], bool)
        for name in ('tokens', 'segment_ids', 'positions'):
            np.testing.assert_array_equal(row[name], wanted[name], name)
            assert row[name].dtype == np.int32
        np.testing.assert_array_equal(row['mask'], mask)
        np.testing.assert_array_equal(row['labels'][mask], np.array(wanted['labels'])[mask])


def test_concat_split_by_hand():
    corpus = corpus_of('ab', 'c', 'defg')
    layout = concat_split(corpus.lengths, np.array([2, 0, 1]), 5)
    check_rows(
        [fill_row(corpus, layout, row) for row in range(layout.num_rows)],
        [
            {
                'tokens': [BOS, *b'defg'],
                'labels': [*b'defg', EOS],
                'mask': [1, 1, 1, 1, 1],
                'segment_ids': [1, 1, 1, 1, 1],
                'positions': [0, 1, 2, 3, 4],
            },
            {
                'tokens': [EOS, BOS, *b'ab', EOS],
                'labels': [0, *b'ab', EOS, 0],
                'mask': [0, 1, 1, 1, 0],
                'segment_ids': [1, 2, 2, 2, 2],
                'positions': [0, 0, 1, 2, 3],
            },
            {
                'tokens': [BOS, *b'c', EOS, PAD, PAD],
                'labels': [*b'c', EOS, 0, 0, 0],
                'mask': [1, 1, 0, 0, 0],
                'segment_ids': [1, 1, 1, 0, 0],
                'positions': [0, 1, 2, 0, 0],
            },
        ],
    )


def test_first_fit_by_hand():
    corpus = corpus_of('ab', 'c', 'defg', '', 'hijklmno')
    layout = first_fit(corpus.lengths, np.arange(5), 6)
    check_rows(
        [fill_row(corpus, layout, row) for row in range(layout.num_rows)],
        [
            {
                'tokens': [BOS, *b'ab', EOS, BOS, EOS],
                'labels': [*b'ab', EOS, 0, EOS, 0],
                'mask': [1, 1, 1, 0, 1, 0],
                'segment_ids': [1, 1, 1, 1, 2, 2],
                'positions': [0, 1, 2, 3, 0, 1],
            },
            {
                'tokens': [BOS, *b'c', EOS, PAD, PAD, PAD],
                'labels': [*b'c', EOS, 0, 0, 0, 0],
                'mask': [1, 1, 0, 0, 0, 0],
                'segment_ids': [1, 1, 1, 0, 0, 0],
                'positions': [0, 1, 2, 0, 0, 0],
            },
            {
                'tokens': [BOS, *b'defg', EOS],
                'labels': [*b'defg', EOS, 0],
                'mask': [1, 1, 1, 1, 1, 0],
                'segment_ids': [1] * 6,
                'positions': [0, 1, 2, 3, 4, 5],
            },
            {
                'tokens': [BOS, *b'hijkl'],
                'labels': [*b'hijklm'],
                'mask': [1] * 6,
                'segment_ids': [1] * 6,
                'positions': [0, 1, 2, 3, 4, 5],
            },
            {
                'tokens': [*b'mno', EOS, PAD, PAD],
                'labels': [*b'no', EOS, 0, 0, 0],
                'mask': [1, 1, 1, 0, 0, 0],
                'segment_ids': [1, 1, 1, 1, 0, 0],
                'positions': [0, 1, 2, 3, 0, 0],
            },
        ],
    )


def test_first_fit_tries_only_the_newest_rows():
    # 300 rows are left with room for 4; only the 256 newest are tried for the last piece.
    lengths = np.array([6] * 300 + [4])
    layout = first_fit(lengths, np.arange(301), 10)
    assert layout.num_rows == 300
    (row,) = np.flatnonzero(np.diff(layout.row_bounds) == 2)
    assert row == 44


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize('packing', ['concat_split', 'first_fit', 'one_a_row'])
def test_every_token_is_packed_once_and_labelled_from_its_own_document(packing, data):
    lengths = data.draw(st.lists(st.integers(2, 12), min_size=1, max_size=8))
    order = data.draw(st.permutations(range(len(lengths))))
    T = data.draw(st.integers(2, 9))
    corpus = numbered_corpus(lengths)
    if packing == 'one_a_row':
        layout = one_a_row(corpus.lengths, T)
    else:
        layout = PACKINGS[packing](corpus.lengths, np.array(order), T)
    rows = [fill_row(corpus, layout, row) for row in range(layout.num_rows)]
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    real = stacked['segment_ids'] > 0

    np.testing.assert_array_equal(np.sort(stacked['tokens'][real]), np.arange(sum(lengths)))
    assert (stacked['tokens'][~real] == -1).all()

    last_of_documents = np.cumsum(lengths) - 1
    np.testing.assert_array_equal(
        stacked['mask'], real & ~np.isin(stacked['tokens'], last_of_documents)
    )
    mask = stacked['mask']
    np.testing.assert_array_equal(stacked['labels'][mask], stacked['tokens'][mask] + 1)

    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for row in rows:
        for segment in range(1, row['segment_ids'].max() + 1):
            (places,) = np.nonzero(row['segment_ids'] == segment)
            tokens = row['tokens'][places]
            np.testing.assert_array_equal(tokens, tokens[0] + np.arange(len(places)))
            assert len(set(document_of[tokens])) == 1
            np.testing.assert_array_equal(places, places[0] + np.arange(len(places)))
            np.testing.assert_array_equal(row['positions'][places], np.arange(len(places)))

    if packing == 'concat_split':
        assert len(rows) == -(-sum(lengths) // T)
        in_order = np.concatenate([np.flatnonzero(document_of == d) for d in order])
        np.testing.assert_array_equal(stacked['tokens'][real], in_order)
    else:
        pieces = sum(-(-length // T) for length in lengths)
        assert len(layout.documents) == pieces
