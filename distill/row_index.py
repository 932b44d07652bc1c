"""Where a row's targets are, by a stable hash of the row itself."""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from distill.types import Batch

KEY_BYTES = 16


def sequence_keys(batch: Batch) -> list[bytes]:
    """Hashes what a teacher's answer depends on: the tokens and segments of each row.

    Args:
        batch: rows on the host.

    Returns:
        16 bytes for each row, the same on any machine.
    """
    content = [np.ascontiguousarray(x, '<i4') for x in (batch.tokens, batch.segment_ids)]
    return [
        hashlib.blake2b(tokens.tobytes() + segments.tobytes(), digest_size=KEY_BYTES).digest()
        for tokens, segments in zip(*content, strict=True)
    ]


class RowIndex:
    """A sorted table of keys: 24 bytes a row, found by bisection.

    Args:
        keys: of the rows.
        places: of each.
    """

    def __init__(self, keys: Sequence[bytes], places: Int[np.ndarray, 'n']) -> None:
        words = np.frombuffer(b''.join(keys), '>u8').reshape(-1, 2)
        order = np.lexsort((words[:, 1], words[:, 0]))
        self._first, self._second = np.ascontiguousarray(words[order].T).astype(np.uint64)
        self._places = np.asarray(places, np.int64)[order]

    def __len__(self) -> int:
        return len(self._places)

    def place(self, key: bytes) -> int | None:
        """Finds the place of a row; None where it is not in the table."""
        first, second = np.frombuffer(key, '>u8').astype(np.uint64)
        low, high = (int(np.searchsorted(self._first, first, side)) for side in ('left', 'right'))
        at = low + int(np.searchsorted(self._second[low:high], second))
        return int(self._places[at]) if at < high and self._second[at] == second else None
