import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.tokenizer import (
    METADATA_FILE,
    TOKENIZER_FILE,
    BPETokenizer,
    ByteTokenizer,
    load_tokenizer,
    train_bpe,
    train_or_load,
)
from moe.errors import InputError

TEXTS = ['def square(x):\n    return x * x\n' * 4, 'naïve café, 漢字 and 🎉; the end of the thing']
HARD = 'a <|eos|> b\r\n\t\0 é 漢字 🎉 ﷽ e\u0301 <|pad|>'


@pytest.fixture(scope='module')
def bpe() -> BPETokenizer:
    return train_bpe(TEXTS, 280)


def test_bytes_are_their_own_ids():
    tokenizer = ByteTokenizer()
    np.testing.assert_array_equal(tokenizer.encode('aé'), [97, 0xC3, 0xA9])
    assert tokenizer.encode('a').dtype == np.int32
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (259, 256, 257)
    assert tokenizer.decode([256, 97, 0xC3, 0xA9, 257, 258, 258]) == 'aé'
    assert tokenizer.decode([97, 0xC3, 98]) == 'a\ufffdb'


def test_bpe_merges_the_commonest_pair_first():
    tokenizer = train_bpe(['xyxyxy xyxy'], 260)
    np.testing.assert_array_equal(tokenizer.encode('xyxyz')[:2], [259, 259])
    assert len(tokenizer.encode('xyxyz')) == 3
    assert tokenizer.decode([259]) == 'xy'
    assert sorted((tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)) == [0, 1, 2]


@settings(max_examples=30, deadline=None)
@given(st.text())
def test_any_text_round_trips(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=30, deadline=None)
@given(text=st.text())
def test_any_text_round_trips_through_bpe(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


@pytest.mark.parametrize('kind', ['byte', 'bpe'])
def test_special_tokens_spelt_in_text_are_text(bpe, kind):
    tokenizer = {'byte': ByteTokenizer(), 'bpe': bpe}[kind]
    ids = tokenizer.encode(HARD)
    specials = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    assert len(specials) == 3
    assert not specials & set(ids.tolist())
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == HARD


@pytest.mark.parametrize('kind', ['byte', 'bpe'])
def test_batches_encode_as_single_texts(bpe, kind):
    tokenizer = {'byte': ByteTokenizer(), 'bpe': bpe}[kind]
    for text, ids in zip(
        [*TEXTS, HARD, ''], tokenizer.encode_batch([*TEXTS, HARD, '']), strict=True
    ):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
        assert ids.dtype == np.int32


@pytest.mark.parametrize('ids', [[-1], [97, 259]])
def test_ids_outside_the_vocabulary_are_refused(ids):
    with pytest.raises(ValueError, match=r'must be in \[0, 259\)'):
        ByteTokenizer().decode(ids)


def test_fingerprints_tell_tokenizers_apart(bpe):
    assert train_bpe(TEXTS, 280).fingerprint == bpe.fingerprint
    others = [
        train_bpe(TEXTS, 279),
        train_bpe(TEXTS[1:], 265),
        train_bpe(TEXTS[:1], 265),
        ByteTokenizer(),
    ]
    assert len({bpe.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_saved_tokenizers_load_by_kind(tmp_path, bpe):
    bpe.save(tmp_path / 'bpe')
    loaded = load_tokenizer(tmp_path / 'bpe')
    assert isinstance(loaded, BPETokenizer)
    assert loaded.fingerprint == bpe.fingerprint
    np.testing.assert_array_equal(loaded.encode(HARD), bpe.encode(HARD))
    ByteTokenizer().save(tmp_path / 'byte')
    assert isinstance(load_tokenizer(tmp_path / 'byte'), ByteTokenizer)


def test_training_happens_once(tmp_path, monkeypatch):
    path = tmp_path / 'tokenizer'
    first = train_or_load(path, TEXTS, 280)
    monkeypatch.setattr('distill.tokenizer.train_bpe', None)
    assert train_or_load(path, TEXTS, 280).fingerprint == first.fingerprint


def test_another_tokenizer_than_asked_is_refused(tmp_path):
    path = tmp_path / 'tokenizer'
    train_or_load(path, TEXTS, 280)
    with pytest.raises(InputError, match=r'another vocab_size 280 \(now 270\)\. Restore'):
        train_or_load(path, TEXTS, 270)
    with pytest.raises(InputError, match='another text_sha256'):
        train_or_load(path, TEXTS[:1], 280)
    with pytest.raises(InputError, match='another text_sha256'):
        train_or_load(path, [TEXTS[0] + TEXTS[1]], 280)


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(InputError, match='must be a directory that a tokenizer was saved in'):
        train_or_load(tmp_path, TEXTS, 280)
    with pytest.raises(InputError, match='missing or broken'):
        load_tokenizer(tmp_path / 'nowhere')
    ByteTokenizer().save(tmp_path / 'byte')
    with pytest.raises(InputError):
        train_or_load(tmp_path / 'byte', TEXTS, 280)


def test_damage_is_noticed(tmp_path, bpe):
    path = tmp_path / 'tokenizer'
    bpe.save(path)
    file = path / TOKENIZER_FILE
    content = json.loads(file.read_text())
    last = max(content['model']['vocab'].values())
    content['model']['merges'].pop()
    content['model']['vocab'] = {k: v for k, v in content['model']['vocab'].items() if v != last}
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match='changed or damaged'):
        load_tokenizer(path)
    file.write_text('{')
    with pytest.raises(InputError, match='not a readable tokenizer'):
        load_tokenizer(path)
    (path / METADATA_FILE).write_text('{')
    with pytest.raises(InputError, match='missing or broken'):
        load_tokenizer(path)


def test_impossible_vocabularies_are_refused():
    with pytest.raises(InputError, match='at least 259; received 258'):
        train_bpe(TEXTS, 258)
    with pytest.raises(InputError, match=r'supports 260\. Ask for that many'):
        train_bpe(['ab'], 300)
