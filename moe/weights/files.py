"""Safetensors files: headers checked, tensors as views of the mapped file, files written in a pass.

A file is eight bytes that hold the header's length, the header as JSON, and the tensors' bytes. The
format's own NumPy library reads no fp8, copies what it reads, and writes a file from memory that
holds all of it, so both directions are here; what they make and take is tested against it.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from moe.errors import InputError

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        'BOOL': np.bool_,
        'U8': np.uint8,
        'I8': np.int8,
        'I16': np.int16,
        'U16': np.uint16,
        'I32': np.int32,
        'U32': np.uint32,
        'I64': np.int64,
        'U64': np.uint64,
        'F8_E4M3': ml_dtypes.float8_e4m3fn,
        'F8_E5M2': ml_dtypes.float8_e5m2,
        'F8_E8M0': ml_dtypes.float8_e8m0fnu,
        'F16': np.float16,
        'BF16': ml_dtypes.bfloat16,
        'F32': np.float32,
        'F64': np.float64,
    }.items()
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
_MAX_HEADER = 100_000_000  # what the format allows
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one tensor stands.

    Attributes:
        file: that holds it.
        dtype: of its elements.
        shape: of the whole tensor.
        offset: of its first byte in the file.
    """

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self) -> np.ndarray:
        """Maps the tensor: the file's pages are read when they are used, and belong to the file."""
        if not self.nbytes:
            return np.zeros(self.shape, self.dtype)
        raw = np.memmap(self.file, np.uint8, 'r', self.offset, (self.nbytes,))
        return raw.view(np.ndarray).view(self.dtype).reshape(self.shape)


def read_header(file: pathlib.Path) -> dict[str, Stored]:
    """Reads which tensors a file holds, and where.

    Raises:
        InputError: where the file is cut off, or its header is damaged. Damage among the tensors'
            own bytes cannot be seen: the format has no checksums.
    """
    size = file.stat().st_size
    with file.open('rb') as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), 'little')
        if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER):
            raise _damaged(file, f'it has {size} bytes, and its header claims {length} of them')
        raw = stream.read(length)
    try:
        entries = json.loads(raw)
        entries.pop('__metadata__', None)
        start = _LENGTH_BYTES + length
        tensors = {name: _stored(file, entry, start) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(file, f'its header cannot be read ({error!r})') from error
    _check_extent(file, tensors, _LENGTH_BYTES + length, size)
    return tensors


def _stored(file: pathlib.Path, entry: dict[str, Any], start: int) -> Stored:
    shape, (begin, end) = tuple(entry['shape']), entry['data_offsets']
    if not all(type(size) is int and size >= 0 for size in (*shape, begin, end)):
        raise ValueError(f'shape {shape} at {begin} to {end}')
    stored = Stored(file, DTYPES[entry['dtype']], shape, start + begin)
    if end - begin != stored.nbytes:
        raise ValueError(f'{end - begin} bytes for {entry["dtype"]}{shape}')
    return stored


def _check_extent(file: pathlib.Path, tensors: dict[str, Stored], start: int, size: int) -> None:
    """Requires that the tensors fill the file one after the other, as the format says."""
    position = start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if stored.offset != position:
            raise _damaged(file, f'tensor {name} begins at byte {stored.offset}, not {position}')
        position += stored.nbytes
    if position != size:
        raise _damaged(file, f'its tensors end at byte {position}, and the file at {size}')


def _damaged(file: pathlib.Path, what: str) -> InputError:
    return InputError(
        f'{file} must be a whole safetensors file: {what}. It is cut off or damaged; fetch it '
        'again.'
    )


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor that is to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(
    file: pathlib.Path, tensors: Sequence[Planned], fetch: Callable[[str], np.ndarray]
) -> None:
    """Writes tensors one after the other: all of the file under its name, or nothing.

    Args:
        file: replaced where it is there.
        tensors: what it shall hold, in this order.
        fetch: called once for each name, in order; only one tensor is in memory at a time.
    """
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    position = 0
    for planned in tensors:
        header[planned.name] = {
            'dtype': _NAMES[planned.dtype],
            'shape': list(planned.shape),
            'data_offsets': [position, position + planned.nbytes],
        }
        position += planned.nbytes
    raw = json.dumps(header, separators=(',', ':')).encode()
    raw += b' ' * (-len(raw) % _ALIGNMENT)
    temporary = file.with_name(f'.{file.name}.tmp')
    with temporary.open('wb') as stream:
        stream.write(len(raw).to_bytes(_LENGTH_BYTES, 'little') + raw)
        for planned in tensors:
            array = np.ascontiguousarray(fetch(planned.name)).reshape(planned.shape)
            assert array.dtype == planned.dtype, planned.name
            stream.write(array.reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
