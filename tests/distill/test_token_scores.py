"""What servers say of tokens, in every form they say it, and what is none of it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill import divergences
from distill.asking import MalformedError
from distill.pretrained_tokenizer import PretrainedTokenizer, write_pretrained
from distill.remote_targets import (
    assemble,
    pieces_of,
    score_reader,
    score_request,
    silent_positions,
)
from distill.token_names import TokenNames
from distill.token_scores import TopRows, nothing_said, top_rows, written
from distill.tokenizer import BPETokenizer, ByteTokenizer, train_bpe
from distill.types import Batch, TopKTargets
from distill.written_targets import bytes_before, written_rows

BYTES = ByteTokenizer()
BOS, EOS = BYTES.bos_id, BYTES.eos_id


@functools.cache
def bpe() -> BPETokenizer:
    return train_bpe(['the cat sat on the mat', 'für Élise — 日本語 🙂🙂 the the'], 290)


def entries(**probabilities: float) -> dict[str, float]:
    return {name: math.log(value) for name, value in probabilities.items()}


def test_a_token_is_known_by_its_number_its_text_its_bytes_or_as_a_special_one():
    names = TokenNames(BYTES)
    assert names.id_of('token_id:200') == 200
    assert names.id_of('token_id:259') is None
    assert names.id_of('a') == 97
    assert names.id_of('bytes:\\xe2') == 0xE2
    assert names.id_of('\ufffd', [0xE2]) == 0xE2
    assert names.id_of('\ufffd') is None
    assert names.id_of('<|eos|>') == EOS
    assert names.id_of('ab') is None


def test_a_name_may_mean_an_id_or_not():
    names = TokenNames(bpe())
    for text in ('the cat', 'für 日本 🙂 Élise'):
        for index in bpe().encode(text).tolist():
            # As a server writes a token that is no whole text.
            name = names.table[index].decode(errors='replace')
            assert names.may_mean(name, index)
            assert names.may_mean(f'token_id:{index}', index)
            assert not names.may_mean(f'token_id:{index + 1}', index)
            assert not names.may_mean(name + 'x', index)
    assert names.may_mean('<s>', bpe().bos_id)
    assert not names.may_mean('<|eos|>', bpe().bos_id)
    ids = {names.id_of(entry.decode()) for entry in names.table if entry.isascii() and entry}
    assert None not in ids
    assert len(ids) == sum(entry.isascii() and bool(entry) for entry in names.table)


@pytest.mark.parametrize('make', [ByteTokenizer, bpe])
def test_a_published_tokenizer_tells_the_same_bytes(make, tmp_path):
    write_pretrained(make(), tmp_path / 'published')
    published = PretrainedTokenizer(tmp_path / 'published')
    assert TokenNames(published).table == TokenNames(make()).table
    assert TokenNames(published).id_of('<|eos|>') == published.eos_id == make().eos_id


def test_the_rest_of_the_mass_is_the_tail():
    rows = top_rows(
        [
            [(5, math.log(0.25)), (3, math.log(0.5)), (None, math.log(0.125)), (9, math.log(0.1))],
            [(1, math.log(0.5)), (2, math.log(0.5)), (4, -9999.0)],
        ],
        k=2,
        vocab_size=300,
    )
    assert rows.ids.tolist() == [[3, 5], [1, 2]]
    np.testing.assert_allclose(np.exp(rows.log_probs), [[0.5, 0.25], [0.5, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(np.exp(rows.tail_log_probs), [0.25, 0], rtol=1e-6, atol=1e-7)


def test_more_ids_than_are_kept_join_the_tail():
    token = [(i, math.log(p)) for i, p in enumerate((0.4, 0.3, 0.2))]
    rows = top_rows([token], 3, 300).likeliest(1)
    np.testing.assert_allclose(np.exp(rows.log_probs), [[0.4]], rtol=1e-6)
    np.testing.assert_allclose(np.exp(rows.tail_log_probs), [0.6], rtol=1e-6)


def test_rows_come_back_from_json_as_they_were():
    rows = top_rows([[(5, -0.25), (3, -2.0)], [(1, -0.5), (2, -3.0)]], 2, 300)
    again = TopRows.unpacked(rows.packed())
    for name, value in vars(rows).items():
        np.testing.assert_array_equal(getattr(again, name), value)


@pytest.mark.parametrize(
    ('token', 'message'),
    [
        ([(1, -0.1), (2, -0.2)], 'sum to 1.72'),
        ([(1, -0.1), (1, -9.0)], 'listed twice'),
        ([(1, -0.1)], '1 log-probabilities are listed, and 2 were asked'),
        ([(1, -0.1), (2, math.nan)], 'nan is no log-probability'),
        ([(1, 0.5), (2, -3.0)], '0.5 is no log-probability'),
        ([(1, None), (2, -3.0)], 'None is no log-probability'),
        ([(1, '-1'), (2, -3.0)], "'-1' is no log-probability"),
    ],
)
def test_what_is_no_distribution_is_malformed(token, message):
    with pytest.raises(MalformedError, match=message):
        top_rows([token], 2, 300)


SENT = (BOS, *b'h\xc3\xa9')  # 'h', then a character of two bytes


def echo(tokens=None, top=None, **changes):
    top = top or [
        None,
        entries(h=0.5, x=0.25),
        {'\ufffd': -0.5, 'h': -3.0},
        {'\ufffd': -1, 'e': -2},
    ]
    tokens = tokens or ['<bos>', 'h', '\ufffd', '\ufffd']
    return {'choices': [{'logprobs': {'tokens': tokens, 'top_logprobs': top}}]} | changes


def read_echo(answer, k=2):
    request = score_request(SENT, 'echo', k, as_ids=False)
    return TopRows.unpacked(score_reader('echo', k, TokenNames(BYTES))(request, answer))


def test_an_echo_in_words():
    rows = read_echo(echo())
    # A piece of a character is no id: its mass is the tail's.
    assert rows.ids[:, 0].tolist() == [ord('h'), ord('h'), ord('e')]
    expected = [[0.5, 0.25], [math.exp(-3), 0], [math.exp(-2), 0]]
    np.testing.assert_allclose(np.exp(rows.log_probs), expected, rtol=1e-6)
    np.testing.assert_allclose(np.exp(rows.tail_log_probs), 1 - np.sum(expected, 1), rtol=1e-6)


def test_an_echo_by_ids_asks_for_ids():
    request = score_request(SENT, 'echo', 5, as_ids=True)
    assert request.body['return_tokens_as_token_ids'] is True
    assert (request.prompt_tokens, request.new_tokens) == (4, 0)


@pytest.mark.parametrize(
    ('answer', 'message'),
    [
        (echo(tokens=['<bos>', 'h', 'é', 'x']), 'misaligned at token 2'),
        (echo(tokens=['<bos>', 'hé', '', '']), 'misaligned at token 1: .*another tokenizer'),
        (echo(tokens=['<bos>', 'h', '\ufffd'], top=[None, {}, {}]), 'misaligned: 3 tokens'),
        (echo(tokens=['<bos>', 'h', '\ufffd', 7]), 'misaligned at token 3'),
        (echo(top=[None, entries(h=0.5, x=0.2), None, {'e': -1.0}]), 'token 2: no log-prob'),
        (echo(choices=[]), 'does not hold one choice'),
        (echo(choices=[{'logprobs': None}]), "'logprobs' is missing"),
        (echo(choices=[{'logprobs': {'tokens': 'abc'}}]), "'tokens' is missing, or no list"),
        ({}, 'does not hold one choice'),
    ],
)
def test_an_echo_of_something_else_is_malformed(answer, message):
    with pytest.raises(MalformedError, match=message):
        read_echo(answer)


def test_prompt_logprobs_are_by_ids():
    request = score_request((BOS, 97, 98), 'prompt_logprobs', 2, as_ids=True)
    assert (request.body['max_tokens'], request.new_tokens) == (1, 1)
    read = score_reader('prompt_logprobs', 2, TokenNames(BYTES))
    said = [None, {'97': {'logprob': -0.5}, '5': {'logprob': -1.5}}]
    answer = {
        'choices': [{'prompt_logprobs': [*said, {'98': {'logprob': -9.0}, '7': {'logprob': -0.1}}]}]
    }
    rows = TopRows.unpacked(read(request, answer))
    assert rows.ids.tolist() == [[97, 5], [7, 98]]
    np.testing.assert_allclose(rows.log_probs, [[-0.5, -1.5], [-0.1, -9.0]])
    for broken, message in (
        ([*said], 'misaligned: 2 tokens came back of 3'),
        ([*said, {'99': {'logprob': -0.5}}], 'misaligned at token 2: id 98 was sent'),
        ([*said, {'98': {}, '7': {'logprob': -1}}], "'logprob' is missing"),
        ([*said, {'98': {'logprob': -1}, 'b': {'logprob': -1}}], "'b' is no id"),
    ):
        with pytest.raises(MalformedError, match=message):
            read(request, {'choices': [{'prompt_logprobs': broken}]})


def batch_of_two_rows() -> Batch:
    """Documents 'ab' and 'cde' end to end in rows of 4: bos a b eos | bos c d e, then eos."""
    tokens = np.array([[BOS, 97, 98, EOS], [BOS, 99, 100, 101]])
    labels = np.array([[97, 98, EOS, 0], [99, 100, 101, EOS]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)
    ones = np.ones((2, 4), int)
    return Batch(tokens, labels, mask, ones, ones)


def test_a_piece_has_the_label_of_its_last_position_behind_it():
    batch = batch_of_two_rows()
    pieces = list(pieces_of(batch, [0, 1]))
    assert [piece.ids for piece in pieces] == [(BOS, 97, 98, EOS), (BOS, 99, 100, 101, EOS)]
    assert [piece.predicted for piece in pieces] == [3, 4]


def test_pieces_follow_segments_and_leave_out_padding():
    tokens = np.array([[EOS, BOS, 97, EOS, BOS, 98, 0, 0]])
    labels = np.array([[0, 97, EOS, 0, 98, 99, 0, 0]])
    mask = np.array([[0, 1, 1, 0, 1, 1, 0, 0]], bool)
    segments = np.array([[1, 2, 2, 2, 3, 3, 0, 0]])
    pieces = list(pieces_of(Batch(tokens, labels, mask, segments, segments), [0]))
    # The first piece predicts nothing.
    assert [(p.start, p.ids) for p in pieces] == [(1, (BOS, 97, EOS)), (4, (BOS, 98, 99))]


def test_rows_stand_where_they_are_about():
    batch = batch_of_two_rows()

    def said(piece):
        if piece.row == 0:
            return None
        tokens = [[(index, -0.5), (7, -2.0)] for index in piece.ids[1:]]
        return top_rows(tokens, 2, 300)

    targets = assemble(batch, 2, said)
    assert targets.ids[1, :, 0].tolist() == batch.labels[1].tolist()
    assert np.isneginf(targets.log_probs[0]).all()
    assert (targets.tail_log_prob[0] == 0).all()
    assert silent_positions(batch, targets) == 3


def test_what_the_teacher_wrote_is_read_in_both_protocols():
    names = TokenNames(BYTES)
    top = [{'token': 'x', 'logprob': -0.5, 'bytes': [120]}]
    chat = {
        'logprobs': {
            'content': [
                {'token': 'x', 'bytes': [120], 'top_logprobs': top},
                {'token': 'token_id:200', 'bytes': None, 'top_logprobs': top},
            ]
        }
    }
    assert written(chat, names) == ([b'x', b'\xc8'], [[(120, -0.5)], [(120, -0.5)]])
    plain = {'logprobs': {'tokens': ['x', 'y'], 'top_logprobs': [{'x': -0.5}, {'z': -1.0}]}}
    assert written(plain, names) == ([b'x', b'y'], [[(120, -0.5)], [(122, -1.0)]])
    plain['logprobs']['tokens'][1] = '\ufffd'
    with pytest.raises(MalformedError, match=r"token 1: '.' does not tell its bytes"):
        written(plain, names)


def test_the_tokens_spell_the_text():
    assert bytes_before([b' ', b'ab', b'\xc3', b'\xbc', b'\n\nuser:'], 'abü') == 1
    assert bytes_before([b'ab'], 'ab') == 0
    with pytest.raises(MalformedError, match='misaligned at byte 1'):
        bytes_before([b'a', b'c'], 'ab')
    with pytest.raises(MalformedError, match='misaligned at byte 2'):
        bytes_before([b'a', b'b'], 'abc')


@pytest.mark.parametrize('text', ['the cat sat', 'für 日本語 — 🙂 the Élise', '  the\n\nmat '])
def test_written_rows_stand_before_the_same_bytes(text):
    """Every token of the student that the teacher wrote too has its row; the others have none."""
    tokenizer = bpe()
    table = TokenNames(tokenizer).table
    prompt = 'on the m'
    own = tokenizer.encode(prompt + text).tolist()
    document = np.array([tokenizer.bos_id, *own, tokenizer.eos_id])
    theirs = tokenizer.encode(text).tolist()
    lengths = [len(table[index]) for index in theirs]
    said = top_rows([[(index, -0.5)] for index in theirs], 1, len(table))
    rows = written_rows(document, table, len(prompt.encode()), lengths, said)

    def spans(ids, start):
        ends = start + np.cumsum([len(table[i]) for i in ids])
        return {(int(e) - len(table[i]), int(e)): i for i, e in zip(ids, ends, strict=True)}

    teacher, at = spans(theirs, len(prompt.encode())), 0
    for place, index in enumerate(own):
        span = (at, at + len(table[index]))
        at = span[1]
        if span in teacher:
            assert rows.ids[place, 0] == index == teacher[span]
            assert rows.log_probs[place, 0] == np.float32(-0.5)
        else:
            assert rows.tail_log_probs[place] == 0
    assert (rows.log_probs > -np.inf).sum() >= len(theirs) - 2
    np.testing.assert_array_equal(rows.log_probs[-2:], nothing_said(2, 1).log_probs)


@pytest.mark.parametrize('name', ['forward_kl', 'reverse_kl', 'jsd', 'total_variation', 'jeffreys'])
def test_where_nothing_was_said_nothing_is_learnt(name):
    """Beside a token that something was said of, and whose loss and gradient are not zero."""
    said = top_rows([[(1, -0.5), (2, -2.0)]], 2, 6)
    silent = nothing_said(1, 2)
    fields = [np.concatenate(pair)[None] for pair in zip(*_fields(said, silent), strict=True)]
    targets = TopKTargets(*map(jnp.asarray, fields))
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 6)), jnp.float32)
    per_token = getattr(divergences, f'{name}_per_token')
    value, gradient = jax.value_and_grad(lambda x: per_token(x, targets).sum())(logits)
    losses = per_token(logits, targets)[0]
    assert losses[0] > 1e-3
    assert losses[1] == 0
    assert value == losses[0]
    assert jnp.abs(gradient[0, 0]).max() > 1e-3
    assert (gradient[0, 1] == 0).all()


def _fields(*rows):
    return [[row.ids, row.log_probs, row.tail_log_probs] for row in rows]
