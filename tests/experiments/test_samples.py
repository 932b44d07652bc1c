"""Beginnings of held-out text: their tokens, their words, and how they go on."""

import numpy as np

from distill.data import evaluation_rows
from distill.sources import Document
from distill.tokenizer import ByteTokenizer
from experiments.samples import held_out_beginnings

BYTES = ByteTokenizer()
TEXTS = ['short', 'the cat sat on the mat and slept', 'up and away it went, my balloon']


def test_a_beginning_is_half_a_row_and_goes_on_as_the_document_does():
    documents = [Document(name=f'{n}', text=text) for n, text in enumerate(TEXTS)]
    held_out = evaluation_rows(documents, BYTES, 16)
    found = held_out_beginnings(held_out, BYTES, 5, 4)
    # A row has bos and 15 bytes; of the short document there is nothing left to go on with.
    assert [(b.text, b.source) for b in found] == [('the cat ', 'sat '), ('up and a', 'way ')]
    assert found[0].ids.tolist() == [BYTES.bos_id, *b'the cat ']
    (one,) = held_out_beginnings(held_out, BYTES, 1, 100)
    assert (one.text, one.source) == ('the cat ', 'sat on ')
    assert held_out_beginnings(held_out, BYTES, 0, 4) == []


def test_a_document_that_ends_in_its_first_row_is_continued_to_its_end():
    held_out = evaluation_rows([Document(name='a', text='nine char')], BYTES, 16)
    (one,) = held_out_beginnings(held_out, BYTES, 1, 100)
    assert (one.text, one.source) == ('nine cha', 'r')
    assert np.issubdtype(one.ids.dtype, np.integer)
