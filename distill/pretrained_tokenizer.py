"""Tokenizers of published models, read from their folder through `tokenizers` alone; and ours out.

A folder's tokenizer.json is all that makes ids; tokenizer_config.json says which tokens stand at
the beginning and end of a text.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from distill.files import whole_directory
from distill.tokenizer import (
    BYTES,
    SPECIALS,
    TOKENIZER_FILE,
    ByteTokenizer,
    Tokenizer,
    verified,
    write_metadata,
)
from moe.errors import InputError

SETTINGS_FILE = 'tokenizer_config.json'
# Copied with a tokenizer, so that what is exported later has them too.
COMPANIONS = (
    SETTINGS_FILE,
    'special_tokens_map.json',
    'added_tokens.json',
    'chat_template.jinja',
    'generation_config.json',
)


class PretrainedTokenizer:
    """The tokenizer of a published model.

    Where a model has no token for the beginning of a text, that of the end stands there too, and
    where it has none for padding, that of the end fills rows, which are never counted.

    Args:
        path: a folder with tokenizer.json and tokenizer_config.json.

    Attributes:
        folder: that it was read from.
        vocab_size: one more than the largest id, added tokens included. A model's vocabulary is
            often padded to more; ids of the padding have no text.

    Raises:
        InputError: where a file is missing or broken, or no token ends a text.
    """

    kind = 'pretrained'

    def __init__(self, path: str | os.PathLike[str]):
        self.folder = pathlib.Path(path)
        self._tokenizer = _read_tokenizer(self.folder / TOKENIZER_FILE)
        settings = _read_settings(self.folder / SETTINGS_FILE)
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        eos = self._special(settings, 'eos')
        if eos is None:
            raise InputError(
                f'{self.folder / SETTINGS_FILE} must name an eos_token that the vocabulary has: '
                'documents end with it. Add it, as the model was trained with.'
            )
        bos, pad = self._special(settings, 'bos'), self._special(settings, 'pad')
        self.eos_id: int = eos
        self.bos_id: int = eos if bos is None else bos
        self.pad_id: int = eos if pad is None else pad
        content = json.dumps([self.kind, json.loads(self._tokenizer.to_str())], sort_keys=True)
        self.fingerprint: str = hashlib.sha256(content.encode()).hexdigest()

    def _special(self, settings: dict[str, Any], role: str) -> int | None:
        token = settings.get(f'{role}_token')
        content = token.get('content') if isinstance(token, dict) else token
        return None if content is None else self._tokenizer.token_to_id(content)

    def encode(self, text: str) -> Int[np.ndarray, 'N']:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, 'N']]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | Int[np.ndarray, 'N']) -> str:
        """Decodes ids; special tokens and a padded vocabulary's ids have no text."""
        values = np.asarray(ids, np.int64)
        if values.size and values.min() < 0:
            raise ValueError(f'ids must be zero or more; received {values.min()}.')
        known = values[values < self.vocab_size]
        return self._tokenizer.decode(known.tolist(), skip_special_tokens=True)

    def encode_rendered(self, text: str) -> Int[np.ndarray, 'N']:
        """Encodes text in which special tokens are spelt out: what a chat template renders."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def to_json(self) -> str:
        """Describes the tokenizer as the `tokenizers` library writes it."""
        return self._tokenizer.to_str()

    def save(self, path: str | os.PathLike[str]) -> None:
        with whole_directory(path) as directory:
            for name in (TOKENIZER_FILE, *COMPANIONS):
                if (self.folder / name).is_file():
                    shutil.copyfile(self.folder / name, directory / name)
            write_metadata(directory, self, {})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> 'PretrainedTokenizer':
        """Loads what `save` wrote."""
        return verified(cls(path), path)


def _read_tokenizer(file: pathlib.Path) -> Any:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(file.read_text())
    except Exception as error:  # tokenizers raises bare Exception for every broken file
        raise InputError(
            f'{file} must be a tokenizer of the library tokenizers; it cannot be read ({error}). '
            'Fetch it again; a model that has tokenizer.model alone is converted by loading and '
            "saving it once with transformers' AutoTokenizer."
        ) from error
    # What a published file cuts or pads is no business of documents that are packed into rows.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Text that spells '<|endoftext|>' is text: it must not end the document it stands in.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _read_settings(file: pathlib.Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f'{file} must be JSON that names the special tokens; it cannot be read ({error}). '
            'Fetch it again.'
        ) from error
    # Some folders keep the names in a file of their own.
    others = file.with_name('special_tokens_map.json')
    return (json.loads(others.read_text()) if others.is_file() else {}) | settings


def write_pretrained(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Writes any tokenizer as the files that published models have, into a new folder.

    Ids are unchanged. Read with its special tokens, a text begins with `bos`, as every document
    that the model was trained on does.
    """
    if isinstance(tokenizer, PretrainedTokenizer):
        tokenizer.save(path)
        return
    import tokenizers
    from tokenizers import processors

    with whole_directory(path) as directory:
        if isinstance(tokenizer, ByteTokenizer):
            fast = _byte_level()
        else:
            tokenizer.save(directory / 'saved')
            fast = tokenizers.Tokenizer.from_file(str(directory / 'saved' / TOKENIZER_FILE))
            shutil.rmtree(directory / 'saved')
        bos, eos, pad = SPECIALS
        fast.encode_special_tokens = False
        fast.post_processor = processors.TemplateProcessing(
            single=f'{bos} $A', pair=f'{bos} $A {bos} $B', special_tokens=[(bos, tokenizer.bos_id)]
        )
        fast.save(str(directory / TOKENIZER_FILE))
        settings = {
            'tokenizer_class': 'PreTrainedTokenizerFast',
            'bos_token': bos,
            'eos_token': eos,
            'pad_token': pad,
            'clean_up_tokenization_spaces': False,
        }
        (directory / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + '\n')


def _byte_level() -> Any:
    """Builds the tokenizer whose ids are the bytes: a byte-level BPE that merges nothing."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def _byte_characters() -> list[str]:
    """Returns the character that stands for each byte in byte-level vocabularies.

    Source: GPT-2's `bytes_to_unicode`: printable characters of Latin-1 stand for themselves, the
        other bytes, in order, for the characters from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, BYTES)}
    others = iter(range(BYTES, 2 * BYTES))
    return [chr(byte if byte in printable else next(others)) for byte in range(BYTES)]
