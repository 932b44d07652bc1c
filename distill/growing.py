"""Batches of text that grows: each epoch is packed from what there is when it begins."""

import bisect
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from distill.corpus import TokenCorpus
from distill.counterpart import parallel_row
from distill.data import DataConfig, check_fingerprint, pack_epoch, shuffled
from distill.packing import RowLayout
from distill.types import Batch
from moe.errors import InputError
from moe.validation import require

# Keeps the order of rows apart from that of documents, which has seed and epoch alone.
_ROWS = 1


@dataclasses.dataclass(frozen=True)
class _Epoch:
    corpus: TokenCorpus
    layout: RowLayout
    order: Int[np.ndarray, 'R']


class GrowingPipeline:
    """Endless batches of this host's rows; epoch `e` holds every token of its own corpus once.

    A batch may hold the end of one epoch and the start of the next. The order follows from the
    corpora and the config alone; hosts share batches as those of `distill.data.TrainPipeline` do,
    and open each epoch at the same batch.

    Args:
        corpus_of: gives the corpus of an epoch, the same whenever it is asked.
        config: the same on every host.
        process_index: of this host.
        process_count: hosts; divides `config.batch_size`.
    """

    def __init__(
        self,
        corpus_of: Callable[[int], TokenCorpus],
        config: DataConfig,
        *,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        require(
            config.batch_size % process_count == 0,
            'data.batch_size',
            f'a multiple of the number of hosts, {process_count}',
            config.batch_size,
        )
        self._corpus_of = corpus_of
        self._config = config
        self._size = config.batch_size // process_count
        self._first = process_index * self._size
        self._batch = 0
        # Of the epochs that have been opened: hash of the documents, rows. The newest two are kept.
        self._known: list[tuple[str, int]] = []
        self._open: dict[int, _Epoch] = {}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        begin = self._batch * self._config.batch_size
        ends = self._cover(begin + self._config.batch_size)
        rows = []
        for row in range(begin + self._first, begin + self._first + self._size):
            number = bisect.bisect_right(ends, row)
            epoch = self._epoch(number)
            place = row - (ends[number - 1] if number else 0)
            rows.append(parallel_row(epoch.corpus, epoch.layout, int(epoch.order[place])))
        self._batch += 1
        fields: Any = jax.tree.map(lambda *values: np.stack(values), *rows)
        return Batch(**fields)

    def get_state(self) -> dict[str, Any]:
        """Gives the position after the last batch that was taken, as plain JSON; for any host."""
        return {
            'position': {'batch': self._batch},
            'fingerprint': dataclasses.asdict(self._config),
            'epochs': [list(known) for known in self._known],
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position.

        Args:
            state: from `get_state`, of a pipeline on any number of hosts.

        Raises:
            InputError: the state belongs to another config or to text that does not grow; and later
                on, when an epoch's corpus is not the one that the state belongs to.
        """
        if 'epochs' not in state:
            raise InputError(
                'The saved position must be one in a growing source; received one in a source that '
                'does not grow. Restore data.source, or start anew in another workdir.'
            )
        check_fingerprint(state['fingerprint'], dataclasses.asdict(self._config))
        self._batch = state['position']['batch']
        self._known = [(sha256, rows) for sha256, rows in state['epochs']]
        self._open.clear()

    def _cover(self, row: int) -> list[int]:
        """Opens epochs until there are so many rows; returns the end of each epoch."""
        ends = list(np.cumsum([rows for _, rows in self._known]))
        while not ends or ends[-1] < row:
            self._epoch(len(self._known))
            ends.append((ends[-1] if ends else 0) + self._known[-1][1])
        return [int(end) for end in ends]

    def _epoch(self, number: int) -> _Epoch:
        """Opens an epoch, unless it is open."""
        if number not in self._open:
            corpus = self._corpus_of(number)
            layout = pack_epoch(corpus, self._config, number)
            order = shuffled(layout.num_rows, self._config.seed, number, _ROWS)
            found = (corpus.source_sha256, layout.num_rows)
            if number < len(self._known) and self._known[number] != found:
                raise InputError(
                    f'Epoch {number} must be of the text that the saved position belongs to; it '
                    'has changed. Bring the logs and the ledger back as they were, or start anew '
                    'in another workdir.'
                )
            self._known[number:] = self._known[number:] or [found]
            self._open = {n: e for n, e in self._open.items() if n == number - 1}
            self._open[number] = _Epoch(corpus, layout, order)
        return self._open[number]
