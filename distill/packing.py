"""Where each piece of each document goes: documents to rows of `T` tokens, as pure functions.

A row is a few pieces of documents, one after the other, then padding. Its arrays are cut from the
corpus when they are asked for, so that any row of any epoch can be had at once and in any order.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from distill.corpus import TokenCorpus

OPEN_ROWS = 256


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Pieces of documents, sorted by row and by offset in the row.

    Attributes:
        documents: the document each piece is of.
        starts: where the piece begins in its document.
        lengths: its tokens.
        row_bounds: pieces of row `r` are `row_bounds[r]` to `row_bounds[r + 1]`.
        seq_len: `T`.
    """

    documents: Int[np.ndarray, 'P']
    starts: Int[np.ndarray, 'P']
    lengths: Int[np.ndarray, 'P']
    row_bounds: Int[np.ndarray, 'R+1']
    seq_len: int

    @property
    def num_rows(self) -> int:
        """Counts the rows."""
        return len(self.row_bounds) - 1


def concat_split(
    lengths: Int[np.ndarray, 'Docs'], order: Int[np.ndarray, 'Docs'], seq_len: int
) -> RowLayout:
    """Joins the documents in an order and cuts every `T` tokens: only the last row is padded.

    Args:
        lengths: tokens of each document, positive.
        order: a permutation of the documents.
        seq_len: `T`.
    """
    ends = np.cumsum(lengths[order])
    begins = ends - lengths[order]
    row_starts = np.arange(0, ends[-1], seq_len)
    cuts = np.union1d(begins, row_starts)
    place = np.searchsorted(begins, cuts, side='right') - 1
    return RowLayout(
        documents=order[place],
        starts=cuts - begins[place],
        lengths=np.diff(cuts, append=ends[-1]),
        row_bounds=np.append(np.searchsorted(cuts, row_starts), len(cuts)),
        seq_len=seq_len,
    )


def first_fit(
    lengths: Int[np.ndarray, 'Docs'], order: Int[np.ndarray, 'Docs'], seq_len: int
) -> RowLayout:
    """Puts each document into the first row with room, cutting only those longer than `T`.

    Only the newest 256 rows are tried, which keeps the time linear.

    Args:
        lengths: tokens of each document, positive.
        order: a permutation of the documents.
        seq_len: `T`.
    """
    documents, starts, sizes = _windows(lengths, order, seq_len)
    rows = np.zeros(len(sizes), np.int64)
    room = np.zeros(len(sizes), np.int64)
    num_rows = 0
    for piece, size in enumerate(sizes):
        oldest = max(0, num_rows - OPEN_ROWS)
        fits = room[oldest:num_rows] >= size
        row = oldest + int(np.argmax(fits)) if fits.any() else num_rows
        if row == num_rows:
            num_rows += 1
            room[row] = seq_len
        room[row] -= size
        rows[piece] = row
    by_row = np.argsort(rows, kind='stable')
    bounds = np.searchsorted(rows[by_row], np.arange(num_rows + 1))
    return RowLayout(documents[by_row], starts[by_row], sizes[by_row], bounds, seq_len)


def one_a_row(lengths: Int[np.ndarray, 'Docs'], seq_len: int) -> RowLayout:
    """Cuts each document every `T` tokens and gives each piece a row of its own, in order."""
    documents, starts, sizes = _windows(lengths, np.arange(len(lengths)), seq_len)
    return RowLayout(documents, starts, sizes, np.arange(len(sizes) + 1), seq_len)


def fill_row(corpus: TokenCorpus, layout: RowLayout, row: int) -> dict[str, np.ndarray]:
    """Cuts one row from the corpus.

    Returns:
        The fields of `Batch`, each [T], `routes` where the corpus has them. A label is the next
        token of the same document, even where that stands in another row: a position is masked only
        where it is padding or holds the last token (`eos`) of its document. Positions count from 0
        in each piece.
    """
    T = layout.seq_len
    tokens = np.full(T, corpus.pad_id, np.int32)
    labels = np.full(T, corpus.pad_id, np.int32)
    mask = np.zeros(T, bool)
    segment_ids = np.zeros(T, np.int32)
    positions = np.zeros(T, np.int32)
    routes = np.zeros(T, np.int32)
    offset = 0
    first, last = layout.row_bounds[row], layout.row_bounds[row + 1]
    for segment, piece in enumerate(range(first, last), start=1):
        document, size = layout.documents[piece], int(layout.lengths[piece])
        start = int(corpus.starts[document] + layout.starts[piece])
        end = offset + size
        labelled = min(size, int(corpus.starts[document + 1]) - 1 - start)
        tokens[offset:end] = corpus.tokens[start : start + size]
        labels[offset : offset + labelled] = corpus.tokens[start + 1 : start + 1 + labelled]
        mask[offset : offset + labelled] = True
        segment_ids[offset:end] = segment
        positions[offset:end] = np.arange(size)
        if corpus.routes is not None:
            routes[offset:end] = corpus.routes[document]
        offset = end
    return {
        'tokens': tokens,
        'labels': labels,
        'mask': mask,
        'segment_ids': segment_ids,
        'positions': positions,
        **({} if corpus.routes is None else {'routes': routes}),
    }


def _windows(
    lengths: Int[np.ndarray, 'Docs'], order: Int[np.ndarray, 'Docs'], seq_len: int
) -> tuple[Int[np.ndarray, 'P'], Int[np.ndarray, 'P'], Int[np.ndarray, 'P']]:
    """Cuts each document every `T` tokens: documents, starts and lengths of the pieces."""
    counts = -(-lengths[order] // seq_len)
    documents = np.repeat(order, counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    starts = (np.arange(len(documents)) - first) * seq_len
    return documents, starts, np.minimum(lengths[documents] - starts, seq_len)
