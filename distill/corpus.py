"""Documents as one stream of token ids, kept on disk for the runs that follow."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from distill.files import file_sha256, whole_directory
from distill.sources import Document
from distill.tokenizer import Tokenizer
from moe.errors import InputError

ARRAYS = ('tokens', 'starts')
DOCUMENTS_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class TokenCorpus:
    """Token ids of documents, one after the other: each is `bos`, its text, `eos`.

    Attributes:
        tokens: `N` ids of all documents, 16-bit where the vocabulary allows; may lie on disk.
        starts: of each document in `tokens`, and the end of the last one.
        pad_id: of the tokenizer.
        source_sha256: of the names and texts.
        tokenizer_fingerprint: of the tokenizer that made the ids.
        routes: the number of each document's teacher; None where data choose none.
        parallel: the same documents in the ids of another tokenizer; None where nobody reads those.
    """

    tokens: Int[np.ndarray, 'N']
    starts: Int[np.ndarray, 'Docs+1']
    pad_id: int
    source_sha256: str
    tokenizer_fingerprint: str
    routes: Int[np.ndarray, 'Docs'] | None = None
    parallel: 'ParallelTokens | None' = None

    @property
    def lengths(self) -> Int[np.ndarray, 'Docs']:
        """Counts the tokens of each document."""
        return np.diff(self.starts)


@dataclasses.dataclass(frozen=True)
class ParallelTokens:
    """The documents of a corpus in another tokenizer's ids, and where both agree on a boundary.

    Attributes:
        corpus: the other one, of the same documents.
        seq_len: `Tt`, tokens of its rows.
        own_spans: of each token of the first corpus its span, from 0 in each document; see
            `distill.spans.shared_spans`.
        spans: of each token of the other corpus.
    """

    corpus: TokenCorpus
    seq_len: int
    own_spans: Int[np.ndarray, 'N']
    spans: Int[np.ndarray, 'Nt']


def documents_sha256(documents: Sequence[Document]) -> str:
    """Hashes names and texts, in order."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name, document.text):
            digest.update(hashlib.sha256(part.encode(errors='surrogatepass')).digest())
    return digest.hexdigest()


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> TokenCorpus:
    """Encodes documents, each between `bos` and `eos`, in memory."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    bos, eos = np.array([tokenizer.bos_id], dtype), np.array([tokenizer.eos_id], dtype)
    parts: list[np.ndarray] = []
    for first in range(0, len(documents), DOCUMENTS_AT_ONCE):
        texts = [document.text for document in documents[first : first + DOCUMENTS_AT_ONCE]]
        for ids in tokenizer.encode_batch(texts):
            parts.append(np.concatenate((bos, ids.astype(dtype), eos)))
    return TokenCorpus(
        tokens=np.concatenate(parts),
        starts=np.cumsum([0, *map(len, parts)], dtype=np.int64),
        pad_id=tokenizer.pad_id,
        source_sha256=documents_sha256(documents),
        tokenizer_fingerprint=tokenizer.fingerprint,
    )


def load_or_tokenize(
    path: str | os.PathLike, documents: Sequence[Document], tokenizer: Tokenizer
) -> TokenCorpus:
    """Reads the tokens of these documents from a cache, or makes them and puts them there.

    Each pair of documents and tokenizer has a directory of its own, which appears whole or not at
    all; several processes may share the cache.

    Args:
        path: directory of the cache.
        documents: of the train split.
        tokenizer: that encodes them.

    Returns:
        A corpus whose tokens are mapped from disk, not read into memory.

    Raises:
        InputError: a cached file is missing or its bytes have changed.
    """
    key = hashlib.sha256(f'{documents_sha256(documents)} {tokenizer.fingerprint}'.encode())
    directory = pathlib.Path(path, key.hexdigest()[:32])
    if not directory.exists():
        _save(directory, tokenize(documents, tokenizer))
    return _load(directory)


def _save(directory: pathlib.Path, corpus: TokenCorpus) -> None:
    with whole_directory(directory) as temporary:
        for name in ARRAYS:
            _save_array(temporary / f'{name}.npy', getattr(corpus, name))
        metadata = {
            'pad_id': corpus.pad_id,
            'source_sha256': corpus.source_sha256,
            'tokenizer_fingerprint': corpus.tokenizer_fingerprint,
            'files': {f'{name}.npy': file_sha256(temporary / f'{name}.npy') for name in ARRAYS},
        }
        (temporary / 'metadata.json').write_text(json.dumps(metadata, indent=2))


def _save_array(path: pathlib.Path, array: np.ndarray) -> None:
    """Writes what `np.save` would, whose error on a full disk does not say that it is full."""
    header = np.lib.format.header_data_from_array_1_0(array)
    with path.open('wb') as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.tobytes())


def _load(directory: pathlib.Path) -> TokenCorpus:
    try:
        metadata = json.loads((directory / 'metadata.json').read_text())
        files = metadata.pop('files')
        changed = [name for name in files if file_sha256(directory / name) != files[name]]
    except (OSError, ValueError) as error:
        raise InputError(
            f'The cached tokens in {directory} are incomplete: {error}. Delete that directory.'
        ) from error
    if changed:
        raise InputError(
            f'The cached tokens in {directory} are damaged: {", ".join(changed)} changed since '
            'they were written. Delete that directory to tokenise again.'
        )
    arrays = {name: np.load(directory / f'{name}.npy', mmap_mode='r') for name in ARRAYS}
    return TokenCorpus(**arrays, **metadata)
