"""The host loop: next batch, dispatch, then look at the step before while this one runs."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging

from distill.config import TrainConfig
from distill.step import StepMetrics
from distill.types import Batch, TrainState


class Batches(Protocol):
    """An endless, resumable stream of host batches."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...


class DivergedError(RuntimeError):
    """Too many updates in a row had a non-finite loss or gradient."""


class Stopped(Exception):  # noqa: N818  a request was met, nothing went wrong
    """The run was asked to stop, and did: the message says where. Nothing is lost."""


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the loop tells the world.

    Attributes:
        save: called with (state, data position, whether to wait until the checkpoint is durable).
        observe: called with (step, metrics on the host) for every step, in order.
        stop_requested: whether the run was asked to stop; in a run of several processes all of them
            must give the same answer at the same step.
        last_saved: the newest durable step, for messages; None before the first.
    """

    save: Callable[[TrainState, dict[str, Any], bool], None]
    observe: Callable[[int, StepMetrics], None]
    stop_requested: Callable[[int], bool]
    last_saved: Callable[[], int | None]


def train(
    state: TrainState,
    *,
    step: Callable[[TrainState, Any], tuple[TrainState, StepMetrics]],
    batches: Batches,
    place: Callable[[Batch], Any],
    config: TrainConfig,
    hooks: Hooks,
) -> TrainState:
    """Runs updates until `config.steps`, saving and observing on the way.

    The metrics of a step are read after the next step has been dispatched, so the device never
    waits for the host.

    Args:
        state: where to start; its `step` says how many updates are behind it.
        step: the compiled update, `(state, batch) -> (state, metrics)`.
        batches: the stream, already at the position that belongs to `state`.
        place: puts a host batch onto the devices.
        config: steps and intervals.
        hooks: where saves and metrics go.

    Returns:
        The state after the last update, saved.

    Raises:
        DivergedError: after `config.max_skipped` skipped updates in a row; names the step, the
            position in the data and the newest durable checkpoint.
        Stopped: after saving, where a stop was requested.
    """
    pending: tuple[int, StepMetrics, dict[str, Any]] | None = None
    for number in range(int(state.step) + 1, config.steps + 1):
        position = batches.get_state()
        state, metrics = step(state, place(next(batches)))
        if pending is not None:
            _settle(*pending, config, hooks)
        pending = (number, metrics, position)
        stopping = hooks.stop_requested(number)
        durable = stopping or number == config.steps
        if durable or number % config.checkpoint_every == 0:
            # A diverged state must not become the newest checkpoint.
            _settle(*pending, config, hooks)
            pending = None
            hooks.save(state, batches.get_state(), durable)
        if stopping and number < config.steps:
            raise Stopped(f'saved at step {number}')
    return state


def _settle(
    number: int, metrics: StepMetrics, position: dict[str, Any], config: TrainConfig, hooks: Hooks
) -> None:
    """Waits for one step's metrics, applies the policy on skipped updates, and passes them on."""
    metrics = jax.tree.map(np.asarray, metrics)
    skipped = int(metrics.skipped)
    if skipped:
        logging.warning(
            'Step %d: loss or gradient not finite; update skipped (%d in a row).', number, skipped
        )
    if skipped >= config.max_skipped:
        raise DivergedError(
            f'{skipped} updates in a row had a non-finite loss or gradient, the last at step '
            f'{number}, on the batch at data position {position}. The newest good checkpoint is of '
            f'step {hooks.last_saved()}. Lower the learning rate or clip_norm, or raise '
            f'train.max_skipped={config.max_skipped}, and start again.'
        )
    hooks.observe(number, metrics)
