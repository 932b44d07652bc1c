"""What a training run writes down as it goes: metrics, progress, checkpoints."""

import io
import pathlib
import sys
import time
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill import distributed
from distill.checkpoint import CheckpointManager, complete_steps
from distill.config import TrainConfig
from distill.load_history import LOAD_HISTORY, encode_load
from distill.metrics import JsonlWriter, Metrics, ProgressLine
from distill.step import StepMetrics
from distill.types import TrainState
from moe.balance import load_statistics


def progress_line(stage: str, total_steps: int) -> ProgressLine:
    """One line of progress on the terminal, of one process of the run."""
    stream = sys.stderr if distributed.is_writer() else io.StringIO()
    return ProgressLine(stage, total_steps, stream)


class Watch:
    """Observes the steps of one run and saves its state; entered for as long as the run goes.

    Args:
        stage: shown on the progress line.
        folder: of `metrics.jsonl` and, with experts, `expert_load.jsonl`.
        manager: of the run's checkpoints.
        config: intervals.
        identity: written into every checkpoint.
        tokens_per_step: of the batch, padding included.
        restored_step: where the run goes on from; 0 for its start.
        seconds_before: that earlier sessions of the run took.
    """

    def __init__(
        self,
        stage: str,
        folder: pathlib.Path,
        manager: CheckpointManager,
        config: TrainConfig,
        identity: dict[str, Any],
        *,
        tokens_per_step: int,
        restored_step: int,
        seconds_before: float,
    ) -> None:
        self._manager = manager
        self._config = config
        self._identity = identity
        self._tokens_per_step = tokens_per_step
        self._first_step = restored_step
        self._seconds_before = seconds_before
        self._started = time.perf_counter()
        self._window = Metrics()
        self._since_checkpoint = Metrics()
        self._load: Any = None
        self._line = progress_line(stage, config.steps)
        self._line.say('compiling')
        self._folder = folder
        self._writer = self._jsonl('metrics.jsonl') if distributed.is_writer() else None
        self._load_writer: JsonlWriter | None = None

    def _jsonl(self, name: str) -> JsonlWriter:
        return JsonlWriter(self._folder / name, restored_step=self._first_step or None)

    def __enter__(self) -> 'Watch':
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._line.close()
        for writer in (self._writer, self._load_writer):
            if writer is not None:
                writer.close()

    def seconds(self) -> float:
        """The wall time of the run so far, over all its sessions."""
        return self._seconds_before + time.perf_counter() - self._started

    def observe(self, step: int, metrics: StepMetrics) -> None:
        """Adds up one step's metrics, and writes the means of every `log_every` steps."""
        for window in (self._window, self._since_checkpoint):
            window.add(metrics.pairs)
        if metrics.load is not None:
            self._load = metrics.load if self._load is None else self._load + metrics.load
        logged = step % self._config.log_every == 0 or step == self._config.steps
        if step > 1 and not logged:
            return
        means = self._window.means()
        self._window = Metrics()
        tokens = (step - self._first_step) * self._tokens_per_step
        self._line.update(step, tokens=tokens, loss=means.get('loss'))
        if self._writer is not None:
            self._writer.write(step, means | _expert_metrics(metrics, self._load))
            self._write_load(step)
        self._load = None

    def _write_load(self, step: int) -> None:
        """Writes each expert's load over the steps since a row, of a model that has some."""
        if self._load is None:
            return
        if self._load_writer is None:
            self._load_writer = self._jsonl(LOAD_HISTORY)
        self._load_writer.write(step, encode_load(jax.device_get(self._load)))

    def save(self, state: TrainState, position: dict[str, Any], wait: bool) -> None:
        """Starts a checkpoint; returns when it is durable where `wait`."""
        self._manager.save(
            int(state.step),
            state,
            data_state=position,
            metadata={'identity': self._identity, 'seconds': self.seconds()},
            metric=self._since_checkpoint.means().get('loss'),
        )
        self._since_checkpoint = Metrics()
        if wait:
            self._manager.wait()

    def last_saved(self) -> int | None:
        """The step of the newest durable checkpoint."""
        return max(complete_steps(self._manager.directory), default=None)


def _expert_metrics(metrics: StepMetrics, window_load: Any) -> dict[str, float]:
    """Returns each MoE layer's statistics of one step, and its MaxVio over the steps since a row.

    An expert may be overloaded in every batch (`max_violation`) and yet not in their sum
    (`max_violation_global`).
    """
    if metrics.load is None:
        return {}
    step = jax.device_get((metrics.load, metrics.dropped, metrics.confidence, window_load))
    rows = {}
    for layer, (load, dropped, confidence, total) in enumerate(zip(*step, strict=True)):
        statistics = load_statistics(jnp.asarray(load), jnp.asarray(dropped))
        statistics['max_violation_global'] = load_statistics(jnp.asarray(total))['max_violation']
        statistics['confidence'] = confidence
        rows |= {f'moe_{layer}/{name}': float(np.asarray(v)) for name, v in statistics.items()}
    return rows
