"""The host loop: next batch, dispatch, then look at the step before while this one runs."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging

from distill.config import TrainConfig
from distill.types import Batch, TrainState

Metrics = dict[str, Any]


class Batches(Protocol):
    """An endless, resumable stream of host batches."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...


class Diverged(RuntimeError):
    """Too many updates in a row had a non-finite loss or gradient."""


class Stopped(Exception):  # noqa: N818  a request was met, nothing went wrong
    """The run was asked to stop; everything up to `step` is saved."""

    def __init__(self, step: int):
        super().__init__(f'stopped and saved at step {step}')
        self.step = step


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the loop tells the world.

    Attributes:
        save: called with (step, state, data_state, elapsed seconds, wait); starts a checkpoint, and waits
            until it is durable where `wait`.
        log: called with (step, metrics on the host, seconds since the loop's start).
        stop_requested: whether somebody (SIGTERM) asked the run to stop.
        last_saved: the newest durable step, for messages; None before the first.
    """

    save: Callable[[int, TrainState, dict[str, Any], bool], None]
    log: Callable[[int, Metrics, float], None]
    stop_requested: Callable[[], bool]
    last_saved: Callable[[], int | None]


def train(
    state: TrainState,
    *,
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    batches: Batches,
    place: Callable[[Batch], Any],
    config: TrainConfig,
    hooks: Hooks,
) -> TrainState:
    """Runs updates until `config.steps`, saving and logging on the way.

    The metrics of a step are read after the next step has been dispatched, so the device never waits for
    the host.

    Args:
        state: where to start; its `step` says how many updates are behind it.
        step: the compiled update, `(state, batch) -> (state, metrics)`; metrics hold `skipped`.
        batches: the stream, already at the position that belongs to `state`.
        place: puts a host batch onto the devices.
        config: steps and intervals.
        hooks: where saves and metrics go.

    Returns:
        The state after the last update, saved.

    Raises:
        Diverged: after `config.max_skipped` skipped updates in a row; names the step, the position in the
            data and the newest durable checkpoint.
        Stopped: after saving, where a stop was requested.
    """
    start = time.perf_counter()
    pending: tuple[int, Metrics, dict[str, Any]] | None = None

    def settle() -> None:
        if pending is not None:
            _settle(*pending, time.perf_counter() - start, config, hooks)

    for number in range(int(state.step) + 1, config.steps + 1):
        position = batches.get_state()
        state, metrics = step(state, place(next(batches)))
        settle()
        pending = (number, metrics, position)
        stopping = hooks.stop_requested()
        last = number == config.steps
        if stopping or last:
            settle()
            pending = None
        if stopping or last or number % config.checkpoint_every == 0:
            hooks.save(number, state, batches.get_state(), stopping or last)
        if stopping and not last:
            raise Stopped(number)
    return state


def _settle(
    number: int,
    metrics: Metrics,
    position: dict[str, Any],
    seconds: float,
    config: TrainConfig,
    hooks: Hooks,
) -> None:
    """Waits for one step's metrics, applies the policy on skipped updates, and logs."""
    skipped = int(metrics['skipped'])
    if skipped:
        logging.warning(
            'Step %d: loss or gradient not finite; update skipped (%d in a row).', number, skipped
        )
    if skipped >= config.max_skipped:
        raise Diverged(
            f'{skipped} updates in a row had a non-finite loss or gradient, the last at step {number} '
            f'(data position {position}). Newest good checkpoint: step {hooks.last_saved()}. Lower the learning '
            f'rate or clip_norm, or raise train.max_skipped={config.max_skipped}, and start again.'
        )
    if number % config.log_every == 0 or number == 1 or number == config.steps:
        hooks.log(number, jax.tree.map(np.asarray, metrics), seconds)
