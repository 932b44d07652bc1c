"""Checkpoints of a run: orbax writes the arrays, and around it stands what orbax does not do.

Checksums of every file, the data position and the metadata inside, the newest good checkpoint used
where one is damaged, and errors that name what differs. `distill.checkpoint_files` has the layout.
"""

import contextlib
import dataclasses
import logging as std_logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from distill import checkpoint_files as files
from distill import distributed
from distill.checkpoint_files import (
    CheckpointInfo,
    complete_steps,
    latest_good_step,
    read_metadata,
)
from distill.manifest import damaged_files, write_json, write_manifest
from moe.errors import InputError

__all__ = [
    'CheckpointInfo',
    'CheckpointManager',
    'CheckpointWriteError',
    'complete_steps',
    'latest_good_step',
    'read_metadata',
]

_ORBAX_THREAD = '_SignalingThread'
# Seconds for threads that wait for a signal which the one that failed will not send.
_WRITERS_S = 10.0


class CheckpointWriteError(OSError, InputError):
    """A checkpoint could not be written; those before it are intact."""


class CheckpointManager:
    """Saves and restores a run's state in one directory, which no other run writes to.

    Every process makes the same calls, in the same order. Process 0 writes what is not an array.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, keep_latest: int = 2, keep_best: int = 0
    ) -> None:
        """Touches no file.

        Args:
            directory: shared by all processes; a relative one is made absolute.
            keep_latest: newest checkpoints to keep, at least 1; older ones go after a save.
            keep_best: checkpoints of the lowest metrics to keep besides.
        """
        for name, value, least in (('latest', keep_latest, 1), ('best', keep_best, 0)):
            if not isinstance(value, int) or value < least:
                raise InputError(
                    f'checkpoint.keep_{name} must be an integer of at least {least}; '
                    f'received {value!r}.'
                )
        self._directory = files.absolute(directory)
        self._keep_latest = keep_latest
        self._keep_best = keep_best
        self._executor = ThreadPoolExecutor(1, thread_name_prefix='checkpoint')
        self._pending: Future[None] | None = None
        self._current: set[int] = set()
        self._damaged: set[int] = set()
        # For good: threads of a save that failed may outlive it and its manager.
        logging.get_absl_logger().addFilter(_raised_too)

    @property
    def directory(self) -> Path:
        """The absolute directory of the checkpoints."""
        return self._directory

    def save(
        self,
        step: int,
        state: Any,
        *,
        data_state: dict[str, Any],
        metadata: dict[str, Any],
        metric: float | None = None,
    ) -> None:
        """Starts to save; returns once the state may be donated.

        Waits first for the save before, and raises what went wrong with it. A step that this
        manager has saved or restored already is not saved again.

        Args:
            step: updates made.
            state: a pytree of arrays, sharded or not.
            data_state: position in the data, alike on all processes; JSON gives it back unchanged.
            metadata: config and fingerprints; likewise.
            metric: the lower the better, for `keep_best`; if not finite, it is never the best.

        Raises:
            InputError: where the directory holds a complete checkpoint of this step or a later one
                that this run has not restored.
            CheckpointWriteError: where this save could not start, or the one before it not end.
        """
        self.wait()
        if step in self._current:
            return
        arrays = _by_name(state)
        info = CheckpointInfo(
            step=step,
            data_state=data_state,
            metadata=metadata,
            metric=metric if metric is not None and math.isfinite(metric) else None,
            arrays={name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in arrays.items()},
        )
        _on_first_process(lambda: self._prepare(info))
        with self._writing(step):
            response = ocp.save_async(str(self._directory / str(step) / files.STATE), arrays)
        self._pending = self._executor.submit(self._finish, step, response)

    def restore(
        self, abstract_state: Any, *, step: int | None = None
    ) -> tuple[Any, dict[str, Any], dict[str, Any], int]:
        """Loads the newest checkpoint whose every file has its checksum, bit for bit.

        Args:
            abstract_state: a pytree like the saved state of arrays or `jax.ShapeDtypeStruct`s with
                shardings, on any mesh.
            step: a step that must be good, rather than the newest that is.

        Returns:
            The state, the data state, the metadata and the step.

        Raises:
            InputError: where no checkpoint is good, naming the files; where an array has another
                dtype or shape than the abstract state, or is missing from either, naming it.
        """
        self.wait()
        chosen = _on_first_process(lambda: self._verified(step))
        directory = self._directory / str(chosen)
        info = files.read_record(directory)
        abstract = _by_name(abstract_state)
        _check_arrays(directory, info.arrays, abstract)
        loaded = ocp.load(
            str(directory / files.STATE),
            {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
                for name, leaf in abstract.items()
            },
        )
        self._current.add(chosen)
        leaves = [loaded[name] for name in abstract]
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
        return state, info.data_state, info.metadata, chosen

    def wait(self) -> None:
        """Waits until the save under way is complete, on every process.

        Raises:
            CheckpointWriteError: at once, on a process that could not write: it has to end, so that
                the others do not wait for it.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.result()
        distributed.barrier('checkpoint')

    def close(self) -> None:
        """Waits as `wait` does, and frees the thread."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def _prepare(self, info: CheckpointInfo) -> int:
        """Makes the step's directory, with its record; process 0 alone."""
        trusted = set(complete_steps(self._directory)) - self._damaged
        if trusted and max(trusted) >= info.step:
            raise InputError(
                f'{self._directory} must hold no checkpoint of step {info.step} or later that this '
                f'run has not gone on from; it holds step {max(trusted)}. Resume that run, or '
                'choose another directory.'
            )
        directory = self._directory / str(info.step)
        with self._writing(info.step):
            files.delete(directory)
            directory.mkdir(parents=True)
            write_json(directory / files.RECORD, dataclasses.asdict(info))
        return info.step

    def _finish(self, step: int, response: ocp.AsyncResponse[None]) -> None:
        """Completes a save, in the background."""
        with self._writing(step):
            response.result()
            if distributed.is_writer():
                write_manifest(self._directory / str(step))
        self._damaged.discard(step)
        self._current.add(step)
        if distributed.is_writer():
            self._delete_superseded()

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Turns a failed write into a message with its remedy, and frees the space it took."""
        try:
            yield
        except (OSError, ValueError) as error:
            # tensorstore reports the operating system's errors as ValueErrors that quote the code.
            if not isinstance(error, OSError) and 'os_error_code' not in str(error):
                raise
            _await_writers()
            with contextlib.suppress(OSError):
                files.delete(self._directory / str(step))
            raise CheckpointWriteError(
                f'The checkpoint of step {step} could not be written to {self._directory}: '
                f'{error}\nMake room on the disk (or raise the quota) and start again: the run '
                f'goes on from the newest of the steps {list(complete_steps(self._directory))}.'
            ) from error

    def _delete_superseded(self) -> None:
        """Keeps the latest and the best; deletes the others, also damaged and incomplete ones."""
        trusted = [s for s in complete_steps(self._directory) if s not in self._damaged]
        metrics = {}
        if self._keep_best:
            metrics = {s: files.read_record(self._directory / str(s)).metric for s in trusted}
        ranked = sorted((m, s) for s, m in metrics.items() if m is not None)
        kept = {*trusted[-self._keep_latest :], *(s for _, s in ranked[: self._keep_best])}
        for step in set(files.all_steps(self._directory)) - kept:
            try:
                files.delete(self._directory / str(step))
            except OSError as error:
                logging.warning('Checkpoint %s/%d not deleted: %s', self._directory, step, error)

    def _verified(self, step: int | None) -> int:
        """Returns the step to restore; process 0 alone."""
        if step is None:
            step, self._damaged = files.newest_good(self._directory)
            if step is None:
                raise InputError(files.absent(self._directory, None))
            return step
        if step not in complete_steps(self._directory):
            raise InputError(files.absent(self._directory, step))
        if damage := damaged_files(self._directory / str(step)):
            raise InputError(files.damaged(self._directory, {step: damage}))
        return step


def _by_name(state: Any) -> dict[str, Any]:
    """The leaves by their path: orbax then sees no container types, and an error can name them."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct) or name in named:
            raise TypeError(f'The state must hold arrays with paths of their own; not so: {name}.')
        named[name] = leaf
    return named


def _check_arrays(
    directory: Path, saved: Mapping[str, list[Any]], abstract: Mapping[str, Any]
) -> None:
    """Refuses what orbax would cast, place by itself, or report without a name."""
    unplaced = [name for name, leaf in abstract.items() if getattr(leaf, 'sharding', None) is None]
    if unplaced:
        raise ValueError(f'The abstract state must give a sharding for every array: {unplaced}.')
    wanted = {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in abstract.items()}
    differing = [name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name)]
    if not differing:
        return

    def phrase(array: list[Any] | None) -> str:
        return 'absent' if array is None else f'{array[0]} {tuple(array[1])}'

    lines = [
        f'  {name}: required {phrase(wanted.get(name))}, saved {phrase(saved.get(name))}'
        for name in differing[:10]
    ]
    raise InputError(
        '\n'.join(
            [
                f'{directory} does not hold the state of this config; {len(differing)} differ:',
                *lines,
                'Restore it with the config that saved it, or choose another directory.',
            ]
        )
    )


def _on_first_process(action: Callable[[], int]) -> int:
    """Runs `action` on process 0; every process has its result, or fails where it failed."""
    error: Exception | None = None
    result = 0
    if distributed.is_writer():
        try:
            result = action()
        except Exception as caught:
            error = caught
    outcome = np.asarray([error is not None, result], np.int32)
    failed, result = multihost_utils.broadcast_one_to_all(outcome)
    if error is not None:
        raise error
    if failed:
        raise InputError('Process 0 could not go on: see its message.')
    return int(result)


def _await_writers() -> None:
    """Waits for orbax's other threads: it raises the first's error while they still write files."""
    end = time.monotonic() + _WRITERS_S
    for thread in threading.enumerate():
        if type(thread).__name__ == _ORBAX_THREAD and thread.is_alive():
            # Not the subclass's own `join`, which raises that thread's error.
            threading.Thread.join(thread, max(0.0, end - time.monotonic()))


def _raised_too(record: std_logging.LogRecord) -> bool:
    """Drops the traceback that orbax logs in each of its threads for an error it also raises."""
    return _ORBAX_THREAD not in str(record.msg)
