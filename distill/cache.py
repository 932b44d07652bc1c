"""What a teacher says, written once and read by any number of students.

    directory/manifest.json   who said it, of what, in which form; see `write_manifest`
    directory/...             the rows, see `distill.target_store`

A row is found by a hash of its tokens and segments, so readers may take rows in any order, in any
batches, on any number of hosts.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from distill.estimators import Estimator, SampledEstimator, TopKEstimator
from distill.manifest import write_json
from distill.nested import flatten
from distill.row_index import RowIndex, sequence_keys
from distill.target_codec import LOG_PROB_STEP, codec_for
from distill.target_store import Layout, ShardRecord, TargetStore, writing
from distill.types import Batch, SampledTargets, TopKTargets
from moe.errors import InputError

MANIFEST, FORMAT = 'manifest.json', 1
ROWS_PER_SHARD = 256
# Shards of one writer that wait for the disk.
_MOST_PENDING = 2
_LIBRARIES = ('jax', 'numpy', 'tensorstore')
_ESTIMATORS = {'top_k': TopKEstimator, 'sampled': SampledEstimator}

Facts = dict[str, Any]


def make_manifest(
    estimator: Estimator,
    *,
    vocab_size: int,
    seq_len: int,
    teacher: Facts,
    tokenizer: str,
    data: Facts,
) -> Facts:
    """Describes targets, as JSON.

    Args:
        estimator: what is kept of the teacher.
        vocab_size: `V`.
        seq_len: `T`, tokens of a row.
        teacher: its identity: the hash of its weights, its declared provenance.
        tokenizer: fingerprint.
        data: fingerprint of the rows.
    """
    (kind,) = (kind for kind, cls in _ESTIMATORS.items() if isinstance(estimator, cls))
    return {
        'format': FORMAT,
        'estimator': {'kind': kind} | vars(estimator),
        'vocab_size': vocab_size,
        'seq_len': seq_len,
        'teacher': teacher,
        'tokenizer': tokenizer,
        'data': data,
        'log_prob_step': LOG_PROB_STEP,
        'versions': {name: metadata.version(name) for name in _LIBRARIES},
    }


def read_manifest(directory: str | os.PathLike) -> Facts:
    """Reads what targets are.

    Raises:
        InputError: there is no manifest, or it is damaged.
    """
    file = pathlib.Path(directory) / MANIFEST
    try:
        return json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise InputError(
            f'{file} must be the manifest of written targets; it cannot be read ({error}). Write '
            'them with --stages=targets, or name another folder.'
        ) from error


def require_manifest(saved: Mapping[str, Any], expected: Mapping[str, Any], directory: Any) -> None:
    """Refuses targets that are not what is expected.

    Args:
        saved: the manifest.
        expected: some of its keys, at any depth, with the values that they must have.
        directory: for the message.

    Raises:
        InputError: names each key that differs, with both values.
    """
    there, here = flatten(saved), flatten(expected)
    lines = [
        f'  {key}: {there.get(key, "absent")!r} there, {value!r} here'
        for key, value in here.items()
        if there.get(key, '') != value
    ]
    if lines:
        raise InputError(
            '\n'.join(
                [
                    f'The targets in {directory} are others than this study asks for:',
                    *lines,
                    'Use what they were written for, or write others in another folder.',
                ]
            )
        )


class TargetsWriter:
    """Writes targets of rows, one writer a host; shards go to disk in the background.

    What an earlier session finished is kept, and `missing` says what is not there yet.

    Args:
        directory: of the targets, shared by all writers.
        manifest: from `make_manifest`; one that is there must say the same, versions aside.
        index: of this writer, in [0, count).
        count: writers; all must have been made before one of them writes.
        rows_per_shard: rows that are lost, at most, when a writer is killed.

    Raises:
        InputError: the directory holds other targets, or damaged ones.
        TargetsWriteError: it cannot be written to.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        manifest: Facts,
        *,
        index: int = 0,
        count: int = 1,
        rows_per_shard: int = ROWS_PER_SHARD,
    ) -> None:
        directory = pathlib.Path(directory)
        self._estimator = estimator_of(manifest)
        self._codec = codec_for(self._estimator, manifest['vocab_size'], manifest['seq_len'])
        if (directory / MANIFEST).exists():
            saved = read_manifest(directory)
            compared = {key: value for key, value in manifest.items() if key != 'versions'}
            require_manifest(saved, compared, directory)
        else:
            with writing(directory):
                directory.mkdir(parents=True, exist_ok=True)
                write_json(directory / MANIFEST, manifest)
        self._store = TargetStore(directory, Layout(self._codec.widths, rows_per_shard))
        records = self._store.records()
        self._known = {bytes.fromhex(key) for record in records for key in record.keys}
        self._shard = max((record.shard for record in records), default=-1) + 1 + index
        self._count = count
        self._rows: dict[bytes, tuple[dict[str, np.ndarray], int]] = {}
        self._executor = ThreadPoolExecutor(1, thread_name_prefix='targets')
        self._pending: list[Future[ShardRecord]] = []

    def missing(self, batch: Batch) -> Bool[np.ndarray, 'R']:
        """Says which rows of a batch on the host have no targets yet; the first of equals."""
        return self._missing(sequence_keys(batch))

    def _missing(self, keys: list[bytes]) -> Bool[np.ndarray, 'R']:
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        return np.array(
            [key not in self._known and first[key] == row for row, key in enumerate(keys)]
        )

    def add(self, batch: Batch, targets: TopKTargets | SampledTargets) -> None:
        """Takes the targets of those rows of a batch that are missing.

        Args:
            batch: rows on the host.
            targets: of the same rows, as NumPy arrays.

        Raises:
            TargetsWriteError: an earlier shard could not be written.
        """
        keys = sequence_keys(batch)
        chosen = np.flatnonzero(self._missing(keys))
        if not len(chosen):
            return
        real = np.asarray(batch.segment_ids)[chosen] > 0
        part = jax.tree.map(lambda x: np.asarray(x)[chosen], targets)
        slots = self._codec.slots(part)
        planes = self._codec.encode(part, real)
        for row, place in enumerate(chosen):
            self._known.add(keys[place])
            rows = {name: plane[row] for name, plane in planes.items()}
            self._rows[keys[place]] = (rows, slots)
        size = self._store.layout.rows_per_shard
        while len(self._rows) >= size:
            self._submit(list(self._rows)[:size])

    def close(self) -> None:
        """Writes the last, shorter shard, and waits until everything is durable."""
        try:
            if self._rows:
                self._submit(list(self._rows))
            self._wait(0)
        finally:
            self._executor.shutdown()

    def _submit(self, keys: list[bytes]) -> None:
        self._wait(_MOST_PENDING - 1)
        taken = [self._rows.pop(key) for key in keys]
        planes = {name: np.stack([rows[name] for rows, _ in taken]) for name in self._codec.widths}
        facts = {'slots': max(slots for _, slots in taken)}
        arguments = (self._shard, keys, planes, facts)
        self._pending.append(self._executor.submit(self._store.write_shard, *arguments))
        self._shard += self._count

    def _wait(self, most: int) -> None:
        while len(self._pending) > most:
            self._pending.pop(0).result()


class CachedTargets:
    """Reads the targets of any rows that were written.

    Args:
        directory: of the targets.
        expected: some of the manifest's keys, with the values that they must have.

    Attributes:
        manifest: what the targets are.

    Raises:
        InputError: the targets are others, a shard is missing, or a file was cut short; names it.
    """

    def __init__(self, directory: str | os.PathLike, expected: Mapping[str, Any]) -> None:
        self._directory = pathlib.Path(directory).absolute()
        self.manifest = read_manifest(directory)
        require_manifest(self.manifest, {'format': FORMAT} | dict(expected), directory)
        self._store = TargetStore(directory)
        vocab_size, seq_len = self.manifest['vocab_size'], self.manifest['seq_len']
        self._codec = codec_for(estimator_of(self.manifest), vocab_size, seq_len)
        records = self._store.records()
        size = self._store.layout.rows_per_shard
        keys = [bytes.fromhex(key) for record in records for key in record.keys]
        places = [r.shard * size + row for r in records for row in range(len(r.keys))]
        self._index = RowIndex(keys, np.array(places, np.int64))
        self._slots = max((record.facts['slots'] for record in records), default=1)

    def __len__(self) -> int:
        """Counts the rows."""
        return len(self._index)

    def read(self, batch: Batch) -> TopKTargets | SampledTargets:
        """Reads what the teacher says of these rows.

        Args:
            batch: rows on the host.

        Returns:
            NumPy arrays [R, T, Vk]; `Vk` is `k`, or the most distinct ids of any token.

        Raises:
            InputError: a row was not written, or its bytes are damaged.
        """
        places = [self._index.place(key) for key in sequence_keys(batch)]
        absent = [row for row, place in enumerate(places) if place is None]
        if absent:
            raise InputError(
                f'{self._directory} must hold the targets of every row that is trained on; of '
                f'{len(places)} rows, {len(absent)} are not among its {len(self)}. Write those of '
                'this data, seed and number of steps with --stages=targets.'
            )
        planes = self._store.read([place for place in places if place is not None])
        return self._codec.decode(planes, np.asarray(batch.segment_ids) > 0, self._slots)

    def verify(self) -> None:
        """Reads every byte and compares it with its checksum; see `TargetStore.verify`."""
        self._store.verify()


def estimator_of(manifest: Mapping[str, Any]) -> Estimator:
    """Returns the estimator that a manifest describes."""
    fields = dict(manifest['estimator'])
    return _ESTIMATORS[fields.pop('kind')](**fields)
