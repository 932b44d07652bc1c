"""Tokenizers of published folders, and ours written as such."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from distill.pretrained_tokenizer import PretrainedTokenizer, write_pretrained
from distill.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from moe.errors import InputError

SPECIAL = '<|endoftext|>'
HARD = f'naïve café\r\n\t 漢字 🎉 {SPECIAL} <tool> ﷽'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A published tokenizer: it cuts, pads, and adds a token by itself; one id is left free."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)} | {'ab': 256}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[('a', 'b')]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([SPECIAL, '<|start|>'])
    tokenizer.add_tokens(['<tool>'])
    tokenizer.post_processor = processors.TemplateProcessing(
        single='<|start|> $A', special_tokens=[('<|start|>', 258)]
    )
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    settings = {'eos_token': {'content': SPECIAL}, 'bos_token': '<|start|>', 'pad_token': None}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
    return tmp_path


def test_ids_of_a_published_folder(folder: Path) -> None:
    tokenizer = PretrainedTokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (257, 258, 257)
    assert tokenizer.vocab_size == 260
    ids = tokenizer.encode('ababab')
    # Neither cut, nor padded, nor begun with a token that the text has not.
    np.testing.assert_array_equal(ids, [256, 256, 256])
    assert ids.dtype == np.int32
    # An added token is one; what spells a special token is text.
    np.testing.assert_array_equal(tokenizer.encode('<tool>'), [259])
    assert 257 not in tokenizer.encode(SPECIAL)
    assert tokenizer.decode(tokenizer.encode(HARD)) == HARD
    np.testing.assert_array_equal(tokenizer.encode_rendered(f'ab{SPECIAL}'), [256, 257])
    assert 257 not in tokenizer.encode(SPECIAL)
    for one, alone in zip(tokenizer.encode_batch(['ab', HARD]), ('ab', HARD), strict=True):
        np.testing.assert_array_equal(one, tokenizer.encode(alone))


def test_padding_of_the_vocabulary_has_no_text(folder: Path) -> None:
    tokenizer = PretrainedTokenizer(folder)
    assert tokenizer.decode([256, 257, 260, 400, 256]) == 'abab'
    with pytest.raises(ValueError, match='received -1'):
        tokenizer.decode([-1])


def test_save_and_load(folder: Path, tmp_path: Path) -> None:
    (folder / 'chat_template.jinja').write_text('x')
    tokenizer = PretrainedTokenizer(folder)
    tokenizer.save(tmp_path / 'saved')
    again = load_tokenizer(tmp_path / 'saved')
    assert again.fingerprint == tokenizer.fingerprint
    assert (tmp_path / 'saved' / 'chat_template.jinja').read_text() == 'x'
    np.testing.assert_array_equal(again.encode(HARD), tokenizer.encode(HARD))
    file = tmp_path / 'saved' / 'tokenizer.json'
    file.write_text(
        file.read_text().replace('"ab":256', '"ab":300').replace('"ab": 256', '"ab": 300')
    )
    with pytest.raises(InputError, match='not the one that was saved'):
        load_tokenizer(tmp_path / 'saved')


def test_folders_without_what_is_needed(folder: Path) -> None:
    settings = folder / 'tokenizer_config.json'
    settings.write_text('{}')
    with pytest.raises(InputError, match='must name an eos_token'):
        PretrainedTokenizer(folder)
    (folder / 'special_tokens_map.json').write_text(json.dumps({'eos_token': SPECIAL}))
    assert PretrainedTokenizer(folder).bos_id == 257
    settings.unlink()
    with pytest.raises(InputError, match='must be JSON that names the special tokens'):
        PretrainedTokenizer(folder)
    (folder / 'tokenizer.json').write_text('{}')
    with pytest.raises(InputError, match='must be a tokenizer of the library tokenizers'):
        PretrainedTokenizer(folder)


@pytest.mark.parametrize('kind', ['byte', 'bpe'])
def test_ours_as_published_files(kind: str, tmp_path: Path) -> None:
    ours = ByteTokenizer() if kind == 'byte' else train_bpe([HARD * 3, 'the end of the end'], 280)
    write_pretrained(ours, tmp_path / 'out')
    theirs = PretrainedTokenizer(tmp_path / 'out')
    assert theirs.vocab_size == ours.vocab_size
    assert (theirs.bos_id, theirs.eos_id, theirs.pad_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    everything = HARD + ''.join(map(chr, range(256)))
    np.testing.assert_array_equal(theirs.encode(everything), ours.encode(everything))
    assert theirs.decode(ours.encode(everything)) == everything
    # As others read the file: a text begins as the documents did that the model learnt from.
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / 'out' / 'tokenizer.json'))
    assert plain.encode('the').ids == [ours.bos_id, *ours.encode('the')]
    assert plain.encode('<|eos|>').ids == [ours.bos_id, ours.eos_id]
