"""The host loop: order of events, saving, the policy on bad updates, being asked to stop."""

import flax.struct
import jax.numpy as jnp
import pytest

from distill.config import TrainConfig
from distill.loop import DivergedError, Hooks, Stopped, train
from distill.types import TrainState


@flax.struct.dataclass
class Measured:
    """All that the loop itself asks of a step's metrics."""

    skipped: jnp.ndarray


class Numbers:
    """Batches 1, 2, 3, ...; its position is the last one given."""

    def __init__(self):
        self.given = 0

    def __next__(self):
        self.given += 1
        return self.given

    def get_state(self):
        return {'given': self.given}


def run(*, bad=(), stop_after=None, last_saved=None, start=0, **config):
    """Runs the loop over a step that adds up its batches; batches in `bad` are skipped."""
    events, batches = [], Numbers()
    batches.given = start

    def step(state, batch):
        skipped = state.skipped + 1 if batch in bad else jnp.int32(0)
        params = state.params + (0 if batch in bad else batch)
        events.append(('dispatch', batch))
        state = state.replace(step=state.step + 1, params=params, skipped=skipped)
        return state, Measured(skipped)

    hooks = Hooks(
        save=lambda state, position, wait: events.append(
            ('save', int(state.step), int(state.params), position['given'], wait)
        ),
        observe=lambda number, metrics: events.append(('observe', number)),
        stop_requested=lambda number: number == stop_after,
        last_saved=lambda: last_saved,
    )
    state = TrainState(
        step=jnp.int32(start),
        params=jnp.int32(0),
        routing={},
        opt_state=(),
        skipped=jnp.int32(0),
    )
    error = None
    try:
        state = train(
            state,
            step=step,
            batches=batches,
            place=lambda batch: batch,
            config=TrainConfig(**config),
            hooks=hooks,
        )
    except (DivergedError, Stopped) as caught:
        error = caught
    return state, events, error


def test_a_step_is_observed_after_the_next_is_dispatched():
    state, events, _ = run(steps=3, checkpoint_every=100)
    assert int(state.params) == 1 + 2 + 3
    assert events == [
        ('dispatch', 1),
        ('dispatch', 2),
        ('observe', 1),
        ('dispatch', 3),
        ('observe', 2),
        ('observe', 3),
        ('save', 3, 6, 3, True),
    ]


def test_saves_hold_the_position_that_belongs_to_the_state():
    _, events, _ = run(steps=5, checkpoint_every=2)
    saves = [event for event in events if event[0] == 'save']
    assert saves == [
        ('save', 2, 3, 2, False),
        ('save', 4, 10, 4, False),
        ('save', 5, 15, 5, True),
    ]


def test_goes_on_from_a_state_and_its_position():
    state, events, _ = run(steps=5, start=3)
    assert [event for event in events if event[0] == 'dispatch'] == [
        ('dispatch', 4),
        ('dispatch', 5),
    ]
    assert int(state.step) == 5


def test_a_finished_run_does_nothing():
    assert run(steps=3, start=3)[1] == []


def test_stops_when_asked_and_saves_first():
    _, events, error = run(steps=10, stop_after=2)
    assert isinstance(error, Stopped)
    assert str(error) == 'saved at step 2'
    assert events[-2:] == [('observe', 2), ('save', 2, 3, 2, True)]


def test_being_asked_at_the_last_step_is_to_be_done():
    state, events, error = run(steps=2, stop_after=2)
    assert error is None
    assert events[-1] == ('save', 2, 3, 2, True)
    assert int(state.step) == 2


def test_isolated_bad_updates_are_passed_over():
    state, _, error = run(steps=6, bad=(2, 3, 5), max_skipped=3)
    assert error is None
    assert int(state.params) == 1 + 4 + 6


def test_too_many_bad_updates_in_a_row_stop_the_run():
    _, events, error = run(steps=10, bad=(4, 5, 6), max_skipped=3, checkpoint_every=2, last_saved=2)
    assert isinstance(error, DivergedError)
    # The batch of step 6 is the one after position 5; the checkpoint of step 6 was never made.
    for part in ('3 updates in a row', 'step 6', "{'given': 5}", 'of step 2'):
        assert part in str(error)
    assert [event[1] for event in events if event[0] == 'save'] == [2, 4]
    assert events[-1] == ('observe', 5)


def test_a_count_must_be_positive():
    with pytest.raises(ValueError, match=r'train.max_skipped must be a positive integer'):
        TrainConfig(steps=1, max_skipped=0)
