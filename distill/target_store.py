"""Rows of bytes on disk: zarr3 arrays whose shards are whole, checksummed and in a journal.

    directory/store.json        the arrays: widths in bytes, rows of a shard, version
    directory/arrays/NAME/      a zarr3 array of uint8 [rows, width]: a row is an inner chunk (zstd,
                                then crc32c), a shard is a file, its index has a crc32c too
    directory/journal/12.json   shard 12: whose rows it holds, size and sha256 of its files; written
                                last, so a shard without its entry was cut off and does not exist

Writers own shards, never parts of them. Nothing is read that the journal does not list.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from distill.files import file_sha256
from distill.manifest import write_json
from moe.errors import InputError

STORE, ARRAYS, JOURNAL = 'store.json', 'arrays', 'journal'
# Shards that the arrays have room for; those that are not written take no space.
MOST_SHARDS = 2**32
COMPRESSION_LEVEL = 5
# Of shard indices that readers keep.
CACHE_BYTES = 2**26

Planes = Mapping[str, UInt8[np.ndarray, 'rows width']]


class TargetsWriteError(OSError, InputError):
    """Targets could not be written; every shard that was finished before is intact."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the arrays are.

    Attributes:
        widths: bytes of a row in each array, by its name.
        rows_per_shard: rows of each shard.
    """

    widths: dict[str, int]
    rows_per_shard: int


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """A finished shard.

    Attributes:
        shard: its number.
        keys: of its rows, in order, in hexadecimal.
        files: bytes and sha256 of its file in each array.
        facts: what else its writer noted, as JSON.
    """

    shard: int
    keys: list[str]
    files: dict[str, list[Any]]
    facts: dict[str, Any]


class TargetStore:
    """The arrays of one directory, to write shards to or read rows from.

    Args:
        directory: that holds or will hold them.
        layout: of the arrays; those of a directory that exists must be the same. None reads it.

    Raises:
        InputError: there is no store and no layout, or the layout is another.
    """

    def __init__(self, directory: str | os.PathLike, layout: Layout | None = None) -> None:
        self.directory = pathlib.Path(directory).absolute()
        file = self.directory / STORE
        fresh = layout is not None and not file.exists()
        self.layout = _read_layout(file) if layout is None or not fresh else layout
        if layout is not None and layout != self.layout:
            raise InputError(
                f'{self.directory} must hold arrays of {layout}; it holds {self.layout}. Choose '
                'another directory, or delete it to write anew.'
            )
        try:
            with writing(self.directory):
                if fresh:
                    (self.directory / JOURNAL).mkdir(parents=True, exist_ok=True)
                self._arrays = _open(self.directory, self.layout, create=fresh)
                if fresh:
                    # Last, so that a store without all of its arrays is none.
                    write_json(file, dataclasses.asdict(self.layout))
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise _damaged(self.directory / ARRAYS, str(error)) from error

    def write_shard(
        self, shard: int, keys: Sequence[bytes], planes: Planes, facts: Mapping[str, Any]
    ) -> ShardRecord:
        """Writes a shard and then its journal entry; returns when both are durable.

        Args:
            shard: a number that no other writer uses.
            keys: of the rows, at most `rows_per_shard`.
            planes: the rows of every array; narrower ones are filled up with zeros.
            facts: kept in the journal.

        Raises:
            TargetsWriteError: the disk would not have it; the journal is as before.
        """
        first = shard * self.layout.rows_per_shard
        if self._entry(shard).exists():
            raise ValueError(f'Shard {shard} of {self.directory} is finished.')
        with writing(self.directory):
            writes = []
            for name, array in self._arrays.items():
                # What a writer that was killed left would be read, to fill up a shorter shard.
                self._file(name, shard).unlink(missing_ok=True)
                rows = np.zeros((len(keys), self.layout.widths[name]), np.uint8)
                rows[:, : planes[name].shape[1]] = planes[name]
                writes.append(array[first : first + len(keys)].write(rows))
            for write in writes:
                write.result()
            files = {name: _fingerprint(self._file(name, shard)) for name in self._arrays}
            record = ShardRecord(shard, [key.hex() for key in keys], files, dict(facts))
            entry = dataclasses.asdict(record)
            write_json(self._entry(shard), entry | {'sha256': _digest(entry)})
        return record

    def records(self) -> list[ShardRecord]:
        """Reads the journal: finished shards, in order of their numbers.

        Raises:
            InputError: an entry is damaged, or a file that one lists is missing or has another
                size; names it.
        """
        folder = self.directory / JOURNAL
        numbers = sorted(int(path.stem) for path in folder.glob('*.json'))
        records = [self._record(number) for number in numbers]
        for record in records:
            for name, (size, _) in record.files.items():
                _require_size(self._file(name, record.shard), size)
        return records

    def verify(self) -> None:
        """Compares every byte of every finished shard with its checksum.

        Raises:
            InputError: names the first file that is not as it was written.
        """
        for record in self.records():
            for name, fingerprint in record.files.items():
                file = self._file(name, record.shard)
                if _fingerprint(file) != fingerprint:
                    raise _damaged(file, 'its checksum differs from the journal')

    def read(self, rows: Sequence[int]) -> dict[str, UInt8[np.ndarray, 'rows width']]:
        """Reads rows by their places (shard * rows_per_shard + place in the shard).

        Raises:
            InputError: a stored byte is not as it was written; names the file.
        """
        places = np.asarray(rows, np.int64)
        reads = {name: array[places].read() for name, array in self._arrays.items()}
        try:
            return {name: read.result() for name, read in reads.items()}
        except ValueError as error:
            raise _damaged(self.directory, str(error)) from error

    def _file(self, name: str, shard: int) -> pathlib.Path:
        return self.directory / ARRAYS / name / 'c' / str(shard) / '0'

    def _entry(self, shard: int) -> pathlib.Path:
        return self.directory / JOURNAL / f'{shard}.json'

    def _record(self, shard: int) -> ShardRecord:
        file = self._entry(shard)
        try:
            entry = json.loads(file.read_text(encoding='utf-8'))
            sound = entry.pop('sha256') == _digest(entry)
            record = ShardRecord(**entry)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise _damaged(file, f'it cannot be read ({error})') from error
        if not sound:
            raise _damaged(file, 'its checksum differs')
        return record


@contextlib.contextmanager
def writing(directory: pathlib.Path) -> Iterator[None]:
    """Turns what the disk refuses into a message with its remedy."""
    try:
        yield
    except (OSError, ValueError) as error:
        # tensorstore reports the operating system's errors as ValueErrors that quote the code.
        if not isinstance(error, OSError) and 'os_error_code' not in str(error):
            raise
        raise TargetsWriteError(
            f'Targets could not be written to {directory}: {error}\nMake room on the disk (or '
            'raise the quota) and start again: the finished shards are kept, and writing goes on '
            'after them.'
        ) from error


def _open(directory: pathlib.Path, layout: Layout, *, create: bool) -> dict[str, Any]:
    """Opens the zarr3 array of each name."""
    import tensorstore

    context = tensorstore.Context({'cache_pool': {'total_bytes_limit': CACHE_BYTES}})
    opening = {
        name: tensorstore.open(
            _spec(directory, name, layout), open=True, create=create, context=context
        )
        for name in layout.widths
    }
    return {name: array.result() for name, array in opening.items()}


def _spec(directory: pathlib.Path, name: str, layout: Layout) -> dict[str, Any]:
    width, rows = layout.widths[name], layout.rows_per_shard
    checked = [{'name': 'bytes'}, {'name': 'crc32c'}]
    compressed = {'name': 'zstd', 'configuration': {'level': COMPRESSION_LEVEL}}
    sharding = {
        'chunk_shape': [1, width],
        'codecs': [checked[0], compressed, checked[1]],
        'index_codecs': [
            {'name': 'bytes', 'configuration': {'endian': 'little'}},
            {'name': 'crc32c'},
        ],
    }
    return {
        'driver': 'zarr3',
        'kvstore': {'driver': 'file', 'path': str(directory / ARRAYS / name)},
        'metadata': {
            'shape': [MOST_SHARDS * rows, width],
            'data_type': 'uint8',
            'fill_value': 0,
            'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': [rows, width]}},
            'codecs': [{'name': 'sharding_indexed', 'configuration': sharding}],
        },
        # A chunk that is missing is an error, so one of zeros has to be there.
        'fill_missing_data_reads': False,
        'store_data_equal_to_fill_value': True,
    }


def _read_layout(file: pathlib.Path) -> Layout:
    try:
        return Layout(**json.loads(file.read_text(encoding='utf-8')))
    except FileNotFoundError as error:
        raise InputError(
            f'{file.parent} must hold targets; there is no {file.name}. Write them with '
            '--stages=targets, or name another folder.'
        ) from error
    except (ValueError, TypeError) as error:
        raise _damaged(file, f'it cannot be read ({error})') from error


def _require_size(file: pathlib.Path, size: int) -> None:
    try:
        received = file.stat().st_size
    except OSError as error:
        raise _damaged(file, f'it is missing ({error.strerror})') from error
    if received != size:
        raise _damaged(file, f'it has {received} bytes instead of {size}')


def _fingerprint(file: pathlib.Path) -> list[Any]:
    return [file.stat().st_size, file_sha256(file)]


def _digest(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _damaged(file: pathlib.Path, what: str) -> InputError:
    return InputError(
        f'The targets in {file} are damaged: {what}. Bring the file back from a copy, or delete '
        'the folder of the targets and write them again.'
    )
