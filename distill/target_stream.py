"""Training batches that carry their targets, read ahead of the step that needs them."""

import collections
import dataclasses
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from distill.types import Batch

READ_AHEAD = 2


class Reader(Protocol):
    """Reads the targets of a batch's rows, as `distill.cache.CachedTargets` does."""

    def read(self, batch: Batch) -> Any: ...


class Pipeline(Protocol):
    """An endless stream of batches that can be moved to a position."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: Mapping[str, Any]) -> None: ...


class TargetStream:
    """A stream of batches with targets; positions are those of the stream without.

    Args:
        pipeline: gives the batches of this host; nobody else may take from it.
        reader: of their targets.
        ahead: batches that are read before they are taken.
    """

    def __init__(self, pipeline: Pipeline, reader: Reader, *, ahead: int = READ_AHEAD) -> None:
        self._pipeline = pipeline
        self._reader = reader
        self._ahead = ahead
        self._executor = ThreadPoolExecutor(1, thread_name_prefix='read-targets')
        self._state = pipeline.get_state()
        self._queue: collections.deque[tuple[Future[Batch], dict[str, Any]]] = collections.deque()

    def __next__(self) -> Batch:
        while len(self._queue) <= self._ahead:
            batch = next(self._pipeline)
            state = self._pipeline.get_state()
            self._queue.append((self._executor.submit(self._with_targets, batch), state))
        future, self._state = self._queue.popleft()
        return future.result()

    def get_state(self) -> dict[str, Any]:
        """Gives the position after the last batch that was taken, whatever was read since."""
        return self._state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position of the pipeline."""
        self._queue.clear()
        self._pipeline.set_state(state)
        self._state = self._pipeline.get_state()

    def close(self) -> None:
        """Frees the thread."""
        self._executor.shutdown(cancel_futures=True)

    def _with_targets(self, batch: Batch) -> Batch:
        return dataclasses.replace(batch, targets=self._reader.read(batch))
