import functools
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.spans import match_vocabularies, shared_spans, token_lengths
from distill.token_bytes import token_bytes
from distill.tokenizer import BPETokenizer, ByteTokenizer, train_bpe
from moe.errors import InputError

TEXTS = [
    'the cat sat on the mat and the cat ran to the other mat',
    'für Élise — naïve café; 日本語の文章 и русский текст 🙂🙂',
    'def f(x):\n    return  x + 1\n\n\tif x == 10:\n        pass\n',
]


@functools.cache
def coarse() -> BPETokenizer:
    return train_bpe(TEXTS, 330)


@functools.cache
def fine() -> BPETokenizer:
    return train_bpe(TEXTS[1:], 280)


def fallback_tokenizer() -> BPETokenizer:
    """A BPE over characters with bytes to fall back on, as Mixtral and Gemma have it."""
    names = ['<|bos|>', '<|eos|>', '<|pad|>', *(f'<0x{byte:02X}>' for byte in range(256))]
    names += ['▁', 'a', 'b', '▁a', 'ab']
    model = tokenizers.models.BPE(
        vocab={name: index for index, name in enumerate(names)},
        merges=[('▁', 'a'), ('a', 'b')],
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Replace(' ', '▁')
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace('▁', ' '), tokenizers.decoders.ByteFallback()]
    )
    tokenizer.add_special_tokens(names[:3])
    return BPETokenizer(tokenizer)


def spelled(tokenizer, text: str) -> bytes:
    table = token_bytes(tokenizer)
    return b''.join(table[index] for index in tokenizer.encode(text))


@pytest.mark.parametrize('text', [*TEXTS, '', ' ', '\r\n\0', 'a' * 50, '<|eos|>', '▁Ġ'])
@pytest.mark.parametrize('make', [ByteTokenizer, coarse, fine])
def test_bytes_of_the_tokens_are_the_bytes_of_the_text(make, text: str) -> None:
    assert spelled(make(), text) == text.encode()


@pytest.mark.parametrize('text', ['ab a', 'a é b', '日', 'b  ab'])
def test_byte_fallback_is_spelled_in_bytes(text: str) -> None:
    assert spelled(fallback_tokenizer(), text) == text.encode()


def test_special_tokens_stand_for_no_bytes() -> None:
    for tokenizer in (ByteTokenizer(), coarse(), fallback_tokenizer()):
        table = token_bytes(tokenizer)
        assert len(table) == tokenizer.vocab_size
        assert {table[i] for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)} == {b''}


def test_tokens_of_unknown_bytes_are_refused() -> None:
    names = ['<|bos|>', '<|eos|>', '<|pad|>', 'a', '##b']
    vocabulary = {name: index for index, name in enumerate(names)}
    pieces = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    with pytest.raises(InputError, match='byte fallback; received a tokenizer of neither kind'):
        token_bytes(BPETokenizer(pieces))


def test_spans_by_hand() -> None:
    # Boundaries at bytes 1 3 6 9 and 3 4 6 8 9: both have 3, 6 and 9.
    student, teacher = shared_spans(np.array([1, 2, 3, 3]), np.array([3, 1, 2, 2, 1]))
    np.testing.assert_array_equal(student, [0, 0, 1, 2])
    np.testing.assert_array_equal(teacher, [0, 1, 1, 2, 2])


def test_tokens_without_bytes_join_a_span() -> None:
    student, teacher = shared_spans(np.array([2, 0, 2]), np.array([2, 2]))
    np.testing.assert_array_equal(student, [0, 0, 1])
    np.testing.assert_array_equal(teacher, [0, 1])


def test_other_text_is_refused() -> None:
    with pytest.raises(InputError, match='received 3 of the student and 4 of the teacher'):
        shared_spans(np.array([1, 2]), np.array([4]))


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.sampled_from(['bytes', 'fine']))
def test_spans_hold_equal_bytes_and_are_the_shortest_that_do(text: str, other: str) -> None:
    sides = []
    for tokenizer in (coarse(), ByteTokenizer() if other == 'bytes' else fine()):
        ids = [tokenizer.bos_id, *tokenizer.encode(text).tolist(), tokenizer.eos_id]
        table = token_bytes(tokenizer)
        sides.append((tokenizer, table, np.array(ids)))
    lengths = [token_lengths(tokenizer, table)[ids] for tokenizer, table, ids in sides]
    spans = shared_spans(*lengths)
    assert spans[0][-1] == spans[1][-1]
    offset = 0
    for span in range(spans[0][-1] + 1):
        pieces = []
        for (_, table, ids), numbers in zip(sides, spans, strict=True):
            pieces.append([table[index] for index in ids[numbers == span]])
        assert b''.join(pieces[0]) == b''.join(pieces[1])
        cuts = [set(np.cumsum([len(piece) for piece in side])[:-1]) for side in pieces]
        assert not cuts[0] & cuts[1], (offset, pieces)
        offset += sum(map(len, pieces[0]))
    assert offset == len(text.encode())
    # What marks the ends of a document stands alone.
    assert [(n == 0).sum() for n in spans] == [1, 1]
    assert [(n == n[-1]).sum() for n in spans] == [1, 1]


def test_vocabularies_match_by_bytes_and_roles_alone() -> None:
    student, teacher = ByteTokenizer(), fallback_tokenizer()
    tables = token_bytes(student), token_bytes(teacher)
    matched = match_vocabularies(student, teacher, *tables)
    pairs = dict(zip(matched.student.tolist(), matched.teacher.tolist(), strict=True))
    names = json.loads(teacher.to_json())['model']['vocab']
    # '▁' and 'a' have bytes of their own names, but '<0x20>' and '<0x61>' come first.
    assert pairs[ord(' ')] == names['<0x20>']
    assert pairs[ord('a')] == names['<0x61>']
    assert pairs[student.bos_id] == teacher.bos_id
    assert pairs[student.eos_id] == teacher.eos_id
    assert len(pairs) == 258
    assert student.pad_id in matched.student_rest
    assert {names['ab'], names['▁a'], names['a'], teacher.pad_id} <= set(matched.teacher_rest)
    for matching, rest, table in (
        (matched.student, matched.student_rest, tables[0]),
        (matched.teacher, matched.teacher_rest, tables[1]),
    ):
        assert sorted([*matching, *rest]) == list(range(len(table)))
