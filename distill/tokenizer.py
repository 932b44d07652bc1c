"""Text to token ids and back: bytes as they are, or a byte-level BPE trained on the train split."""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from distill.files import whole_directory
from moe.errors import InputError

BYTES = 256
SPECIALS = ('<|bos|>', '<|eos|>', '<|pad|>')
TOKENIZER_FILE = 'tokenizer.json'
METADATA_FILE = 'fractional_tokenizer.json'


class Tokenizer(Protocol):
    """What data, evaluation and generation ask of a tokenizer.

    Attributes:
        kind: 'byte', 'bpe' or 'pretrained'.
        vocab_size: number of ids; a model's vocabulary must be at least as wide.
        bos_id: stands before every document, so that its first token is predicted too.
        eos_id: ends every document.
        pad_id: fills rows; never counted.
        fingerprint: sha256 of kind, sorted vocabulary and merges: equal fingerprints, equal ids.
    """

    @property
    def kind(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> Int[np.ndarray, 'N']:
        """Encodes one text, without `bos` or `eos`; what looks like a special token stays text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, 'N']]:
        """Encodes several texts, in parallel where that helps."""
        ...

    def decode(self, ids: Sequence[int] | Int[np.ndarray, 'N']) -> str:
        """Decodes ids, leaving out special tokens; broken utf-8 becomes U+FFFD."""
        ...

    def save(self, path: str | os.PathLike) -> None:
        """Writes the tokenizer into a new directory, all of it or nothing."""
        ...


class ByteTokenizer:
    """The 256 bytes of utf-8 text, then `bos`, `eos` and `pad`."""

    kind = 'byte'
    vocab_size = BYTES + len(SPECIALS)
    bos_id, eos_id, pad_id = range(BYTES, BYTES + len(SPECIALS))

    @property
    def fingerprint(self) -> str:
        vocabulary = [f'{byte:02x}' for byte in range(BYTES)] + list(SPECIALS)
        return _fingerprint(self.kind, {token: i for i, token in enumerate(vocabulary)}, [])

    def encode(self, text: str) -> Int[np.ndarray, 'N']:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, 'N']]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | Int[np.ndarray, 'N']) -> str:
        valid = _valid_ids(ids, self.vocab_size)
        return valid[valid < BYTES].astype(np.uint8).tobytes().decode(errors='replace')

    def save(self, path: str | os.PathLike) -> None:
        with whole_directory(path) as directory:
            write_metadata(directory, self, {})

    @classmethod
    def load(cls, path: str | os.PathLike) -> 'ByteTokenizer':
        """Loads what `save` wrote."""
        return verified(cls(), path)


class BPETokenizer:
    """Byte-level byte-pair encoding of Hugging Face `tokenizers`: any text round-trips.

    Args:
        tokenizer: a `tokenizers.Tokenizer` with a BPE model whose vocabulary holds `SPECIALS`.
        training: what it was trained on, kept beside it: `vocab_size` asked and `text_sha256`.
    """

    kind = 'bpe'

    def __init__(self, tokenizer: Any, training: dict[str, Any] | None = None):
        # Text that spells '<|eos|>' is text: it must not end the document it stands in.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._training = training or {}
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.bos_id, self.eos_id, self.pad_id = map(tokenizer.token_to_id, SPECIALS)
        model = json.loads(tokenizer.to_str())['model']
        merges = [
            merge.split(' ') if isinstance(merge, str) else merge for merge in model['merges']
        ]
        self.fingerprint: str = _fingerprint(self.kind, tokenizer.get_vocab(), merges)

    def encode(self, text: str) -> Int[np.ndarray, 'N']:
        return np.asarray(self._tokenizer.encode(text).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, 'N']]:
        encodings = self._tokenizer.encode_batch_fast(list(texts))
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | Int[np.ndarray, 'N']) -> str:
        valid = _valid_ids(ids, self.vocab_size)
        return self._tokenizer.decode(valid.tolist(), skip_special_tokens=True)

    def to_json(self) -> str:
        """Describes the tokenizer as the `tokenizers` library writes it."""
        return self._tokenizer.to_str()

    def save(self, path: str | os.PathLike) -> None:
        with whole_directory(path) as directory:
            self._tokenizer.save(str(directory / TOKENIZER_FILE))
            write_metadata(directory, self, self._training)

    @classmethod
    def load(cls, path: str | os.PathLike) -> 'BPETokenizer':
        """Loads what `save` wrote."""
        import tokenizers

        metadata = _read_metadata(path)
        file = pathlib.Path(path, TOKENIZER_FILE)
        try:
            tokenizer = tokenizers.Tokenizer.from_str(file.read_text())
        except Exception as error:  # tokenizers raises bare Exception for every broken file
            raise InputError(
                f'{file}: not a readable tokenizer; {error}. Delete {path} to train it again.'
            ) from error
        return verified(cls(tokenizer, metadata['training']), path)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Loads a tokenizer of any kind from the directory that its `save` wrote."""
    from distill.pretrained_tokenizer import PretrainedTokenizer

    kinds = {'byte': ByteTokenizer, 'bpe': BPETokenizer, 'pretrained': PretrainedTokenizer}
    return kinds[_read_metadata(path)['kind']].load(path)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Trains a byte-level BPE; the same texts give the same tokenizer.

    Args:
        texts: the train split.
        vocab_size: ids in all: 256 bytes, 3 special tokens, and the merges.

    Raises:
        InputError: `vocab_size` leaves no room for the bytes, or the text has too few pairs.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    least = BYTES + len(SPECIALS)
    if vocab_size < least:
        raise InputError(
            f'A byte-level BPE needs a vocabulary of at least {least}; received {vocab_size}.'
        )
    texts = list(texts)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise InputError(
            f'The train text must have pairs enough for a vocabulary of {vocab_size}; it supports '
            f'{tokenizer.get_vocab_size()}. Ask for that many or fewer, or give more text.'
        )
    return BPETokenizer(tokenizer, {'vocab_size': vocab_size, 'text_sha256': _texts_sha256(texts)})


def train_or_load(path: str | os.PathLike, texts: Sequence[str], vocab_size: int) -> BPETokenizer:
    """Loads the BPE at `path` where it is the one asked for; trains and saves it where none is.

    Args:
        path: a directory; made if it is not there.
        texts: the train split.
        vocab_size: as in `train_bpe`.

    Raises:
        InputError: what stands at `path` was trained on other text or to another size, or is no
            tokenizer of this package.
    """
    path = pathlib.Path(path)
    if not (path.exists() and any(path.iterdir())):
        train_bpe(texts, vocab_size).save(path)
    tokenizer = BPETokenizer.load(path)
    asked = {'vocab_size': vocab_size, 'text_sha256': _texts_sha256(texts)}
    saved = _read_metadata(path)['training']
    changed = [
        f'{name} {saved.get(name)} (now {asked[name]})'
        for name in asked
        if saved.get(name) != asked[name]
    ]
    if changed:
        raise InputError(
            f'The tokenizer at {path} was trained with another {", ".join(changed)}. Restore what '
            'it was trained with, choose another workdir, or delete that directory to train again.'
        )
    return tokenizer


def _fingerprint(kind: str, vocabulary: dict[str, int], merges: list[list[str]]) -> str:
    content = json.dumps([kind, sorted(vocabulary.items()), merges])
    return hashlib.sha256(content.encode()).hexdigest()


def _texts_sha256(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def _valid_ids(values: Sequence[int] | np.ndarray, vocab_size: int) -> Int[np.ndarray, 'N']:
    ids = np.asarray(values, np.int64)
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise ValueError(
            f'ids must be in [0, {vocab_size}); received {ids.min()} to {ids.max()}. A model with '
            'a wider vocabulary must not sample its padding.'
        )
    return ids


def write_metadata(directory: pathlib.Path, tokenizer: Tokenizer, training: dict) -> None:
    """Writes beside a tokenizer what tells it from others."""
    metadata = {
        'kind': tokenizer.kind,
        'vocab_size': tokenizer.vocab_size,
        'fingerprint': tokenizer.fingerprint,
        'training': training,
    }
    (directory / METADATA_FILE).write_text(json.dumps(metadata, indent=2))


def _read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    file = pathlib.Path(path, METADATA_FILE)
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f'{path} must be a directory that a tokenizer was saved in; {file.name} there is '
            f'missing or broken ({error}). Name another directory, or delete it to start anew.'
        ) from error


def verified(tokenizer: Any, path: str | os.PathLike) -> Any:
    """Returns a tokenizer that was loaded; refuses one that is not what was saved there."""
    saved = _read_metadata(path)
    if (saved['kind'], saved['fingerprint']) != (tokenizer.kind, tokenizer.fingerprint):
        raise InputError(
            f'{path}: the tokenizer ({tokenizer.kind}, {tokenizer.fingerprint[:12]}) is not the '
            f'one that was saved there ({saved["kind"]}, {saved["fingerprint"][:12]}): a file was '
            'changed or damaged. Restore it, or delete the directory.'
        )
    return tokenizer
