"""Packed batches for training, exactly resumable on any number of hosts; rows for evaluation."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import grain
import numpy as np
from jaxtyping import Int

from distill.corpus import TokenCorpus, tokenize
from distill.counterpart import parallel_row
from distill.packing import RowLayout, concat_split, fill_row, first_fit, one_a_row
from distill.sources import Document
from distill.tokenizer import Tokenizer
from distill.types import Batch
from moe.config import require
from moe.errors import InputError

Packing = Literal['concat_split', 'first_fit']
Fingerprint = dict[str, str | int]
# Endless in effect. Grain's own endless repeat overflows where a batch is one row.
EPOCHS = 2**20
READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How documents become batches.

    Attributes:
        seq_len: `T`, tokens of a row.
        batch_size: rows of a batch, over all hosts; a multiple of the number of hosts.
        seed: of the order of documents and rows, in [0, 2^32).
        packing: 'concat_split' wastes nothing but cuts documents at row ends, in other places every
            epoch; 'first_fit' cuts only documents longer than `seq_len`, and pads.
    """

    seq_len: int
    batch_size: int
    seed: int
    packing: Packing = 'concat_split'

    def __post_init__(self) -> None:
        for name, least, below in (
            ('seq_len', 2, 2**31),
            ('batch_size', 1, 2**31),
            ('seed', 0, 2**32),
        ):
            value = getattr(self, name)
            valid = isinstance(value, int) and not isinstance(value, bool)
            require(
                valid and least <= value < below,
                f'data.{name}',
                f'an integer of at least {least}, below {below}',
                value,
            )
        choices = get_args(Packing)
        require(
            self.packing in choices,
            'data.packing',
            f'one of {", ".join(map(repr, choices))}',
            self.packing,
        )


def fingerprint(corpus: TokenCorpus, config: DataConfig) -> Fingerprint:
    """Describes what the sequence of batches depends on; the number of hosts is no part of it."""
    routes = {}
    if corpus.routes is not None:
        numbers = np.ascontiguousarray(corpus.routes, np.int64)
        routes = {'routes': hashlib.sha256(numbers.tobytes()).hexdigest()}
    parallel = {}
    if corpus.parallel is not None:
        parallel = {
            'teacher_tokenizer': corpus.parallel.corpus.tokenizer_fingerprint,
            'teacher_seq_len': corpus.parallel.seq_len,
        }
    return {
        'source': corpus.source_sha256,
        'tokenizer': corpus.tokenizer_fingerprint,
        **routes,
        **parallel,
        **dataclasses.asdict(config),
    }


def check_fingerprint(saved: Mapping[str, str | int], current: Mapping[str, str | int]) -> None:
    """Raises an `InputError` that names each component in which two fingerprints differ."""
    changed = [
        f'{name} (was {saved.get(name, "absent")}, is {current.get(name, "absent")})'
        for name in sorted({*saved, *current})
        if saved.get(name) != current.get(name)
    ]
    if changed:
        raise InputError(
            f'The data must be what the saved position belongs to; changed: {", ".join(changed)}. '
            'Restore it, or start anew in another workdir.'
        )


def pack_epoch(corpus: TokenCorpus, config: DataConfig, epoch: int) -> RowLayout:
    """Packs documents in an order of the epoch."""
    order = shuffled(len(corpus.lengths), config.seed, epoch)
    pack = {'concat_split': concat_split, 'first_fit': first_fit}[config.packing]
    return pack(corpus.lengths, order, config.seq_len)


def shuffled(count: int, *seeds: int) -> Int[np.ndarray, 'n']:
    """Permutes `count` numbers; other seeds, another order."""
    # Sorting raw bits: NumPy keeps those the same over versions, unlike `permutation`.
    return np.argsort(np.random.Philox(seed=list(seeds)).random_raw(count), kind='stable')


class TrainPipeline:
    """Endless batches of this host's rows, in an order fixed by corpus and config alone.

    Each epoch holds every token once. Documents are packed in an order of the epoch, and rows are
    shuffled over the whole epoch; a batch may hold the end of one epoch and the start of the next.
    With `H` hosts, batch `b` of host `h` is the `h`-th of `H` equal slices of the global batch `b`:
    joined in order of `h` they are the batch that one host would have.

    Args:
        corpus: the same on every host.
        config: likewise.
        process_index: `h`.
        process_count: `H`; divides `config.batch_size`.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        config: DataConfig,
        *,
        process_index: int = 0,
        process_count: int = 1,
    ):
        require(
            config.batch_size % process_count == 0,
            'data.batch_size',
            f'a multiple of the number of hosts, {process_count}',
            config.batch_size,
        )
        self._corpus = corpus
        self._config = config
        self._layout = functools.lru_cache(maxsize=2)(self._pack)
        self.fingerprint = fingerprint(corpus, config)
        self.rows_per_epoch = self._layout(0).num_rows
        dataset = (
            grain.MapDataset.range(self.rows_per_epoch)
            .seed(config.seed)
            .shuffle()
            .repeat(EPOCHS)
            .map_with_index(self._row)
            .batch(config.batch_size // process_count)[process_index::process_count]
            .map(lambda fields: Batch(**fields))
        )
        self._iterator = iter(dataset.to_iter_dataset(READ_AHEAD))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Gives the position after the last batch that was taken, as plain JSON; for any host."""
        return {'position': self._iterator.get_state(), 'fingerprint': self.fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position.

        Args:
            state: from `get_state`, of a pipeline on any number of hosts.

        Raises:
            InputError: the state belongs to other data, naming what changed.
        """
        check_fingerprint(state['fingerprint'], self.fingerprint)
        self._iterator.set_state(dict(state['position']))

    def _row(self, index: int, row: int) -> dict[str, Any]:
        return parallel_row(self._corpus, self._layout_of(index // self.rows_per_epoch), row)

    def _layout_of(self, epoch: int) -> RowLayout:
        # The number of rows must not change from epoch to epoch: first fit keeps its first packing.
        return self._layout(epoch if self._config.packing == 'concat_split' else 0)

    def _pack(self, epoch: int) -> RowLayout:
        return pack_epoch(self._corpus, self._config, epoch)


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """Held-out documents in rows: a document's rows follow each other and hold nothing else.

    Attributes:
        rows: the fields of `Batch`, each [R, T].
        document_index: the document of each row.
        byte_counts: utf-8 bytes of each document: summed nats / (ln 2 * bytes) are bits per byte.
        names: of the documents.
    """

    rows: dict[str, Any]
    document_index: Int[np.ndarray, 'R']
    byte_counts: Int[np.ndarray, 'Docs']
    names: tuple[str, ...]

    def batches(self, batch_size: int) -> Iterator[tuple[Batch, Int[np.ndarray, 'B']]]:
        """Gives batches of exactly `batch_size` rows, and the document of each row.

        Rows that fill the last batch are masked copies of its last row, of document -1.
        """
        num_rows = len(self.document_index)
        for first in range(0, num_rows, batch_size):
            rows = np.arange(first, first + batch_size)
            real = rows < num_rows
            rows = np.minimum(rows, num_rows - 1)
            fields = {name: values[rows] for name, values in self.rows.items()}
            for name in ('mask', 'segment_ids'):
                fields[name] = fields[name] * real[:, None]
            yield Batch(**fields), np.where(real, self.document_index[rows], -1)


def evaluation_rows(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    max_documents: int | None = None,
) -> EvaluationSet:
    """Cuts held-out documents into rows of `T` tokens in which every token is predicted once.

    A document is `bos`, its text, `eos`; all but `bos` are predicted. A document longer than `T` is
    cut every `T` tokens. A row's last label is the first token of the next row, so nothing is left
    out; but what a row sees begins with its own first token: predictions early in a row have little
    context.

    Args:
        documents: the held-out split.
        tokenizer: that encodes them.
        seq_len: `T`, tokens of a row.
        max_documents: keep that many, chosen by a hash of their text; None keeps all.

    Returns:
        Rows in the order of the documents.
    """
    require(
        max_documents is None or max_documents > 0,
        'max_documents',
        'a positive number, or None',
        max_documents,
    )
    if max_documents is not None and max_documents < len(documents):
        digests = [hashlib.sha256(document.text.encode()).digest() for document in documents]
        chosen = sorted(range(len(documents)), key=digests.__getitem__)[:max_documents]
        documents = [documents[index] for index in sorted(chosen)]
    corpus = tokenize(documents, tokenizer)
    layout = one_a_row(corpus.lengths, seq_len)
    rows = [fill_row(corpus, layout, row) for row in range(layout.num_rows)]
    return EvaluationSet(
        rows={name: np.stack([row[name] for row in rows]) for name in rows[0]},
        document_index=layout.documents,
        byte_counts=np.array([len(document.text.encode()) for document in documents]),
        names=tuple(document.name for document in documents),
    )
