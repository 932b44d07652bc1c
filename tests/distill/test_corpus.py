import numpy as np
import pytest

from distill.corpus import documents_sha256, load_or_tokenize, tokenize
from distill.sources import Document
from distill.tokenizer import ByteTokenizer, train_bpe
from moe.errors import InputError

DOCUMENTS = [Document('a', 'ab'), Document('b', 'é')]


def test_every_document_stands_between_bos_and_eos():
    corpus = tokenize(DOCUMENTS, ByteTokenizer())
    np.testing.assert_array_equal(corpus.tokens, [256, 97, 98, 257, 256, 0xC3, 0xA9, 257])
    np.testing.assert_array_equal(corpus.starts, [0, 4, 8])
    np.testing.assert_array_equal(corpus.lengths, [4, 4])
    assert corpus.pad_id == 258


def test_many_documents_keep_their_order():
    texts = [chr(97 + i % 26) * (i % 7 + 1) for i in range(600)]
    corpus = tokenize([Document('', text) for text in texts], ByteTokenizer())
    decoded = ByteTokenizer().decode(corpus.tokens)
    assert decoded == ''.join(texts)
    np.testing.assert_array_equal(corpus.lengths, [len(text) + 2 for text in texts])


def test_the_hash_sees_names_texts_and_their_borders():
    variants = [
        DOCUMENTS,
        DOCUMENTS[::-1],
        [Document('a', 'ab'), Document('b', 'e')],
        [Document('a', 'ab'), Document('c', 'é')],
        [Document('a', 'a'), Document('bb', 'é')],
    ]
    assert len({documents_sha256(variant) for variant in variants}) == len(variants)


def test_the_cache_is_used_again_and_separates_documents_and_tokenizers(tmp_path, monkeypatch):
    bpe = train_bpe(['ab ab'], 260)
    asked = [(DOCUMENTS, ByteTokenizer()), (DOCUMENTS[:1], ByteTokenizer()), (DOCUMENTS, bpe)]
    made = [load_or_tokenize(tmp_path, *pair) for pair in asked]
    monkeypatch.setattr('distill.corpus.tokenize', None)
    for pair, corpus in zip(asked, made, strict=True):
        again = load_or_tokenize(tmp_path, *pair)
        fresh = tokenize(*pair)
        for one in (corpus, again):
            np.testing.assert_array_equal(one.tokens, fresh.tokens)
            np.testing.assert_array_equal(one.starts, fresh.starts)
            assert one.pad_id == fresh.pad_id
            assert one.source_sha256 == fresh.source_sha256
            assert one.tokenizer_fingerprint == fresh.tokenizer_fingerprint


def test_a_cut_off_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr('distill.corpus.file_sha256', fail)
        with pytest.raises(OSError, match='No space left'):
            load_or_tokenize(tmp_path, DOCUMENTS, ByteTokenizer())
    assert list(tmp_path.iterdir()) == []
    assert len(load_or_tokenize(tmp_path, DOCUMENTS, ByteTokenizer()).tokens) == 8


def test_a_damaged_cache_is_refused(tmp_path):
    load_or_tokenize(tmp_path, DOCUMENTS, ByteTokenizer())
    (file,) = tmp_path.glob('*/tokens.npy')
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r'tokens\.npy changed since.*Delete that directory'):
        load_or_tokenize(tmp_path, DOCUMENTS, ByteTokenizer())
    file.unlink()
    with pytest.raises(InputError, match='are incomplete'):
        load_or_tokenize(tmp_path, DOCUMENTS, ByteTokenizer())
