"""Batches carry the targets of their own rows, and positions are those of what was taken."""

import numpy as np
import pytest

from distill.target_stream import TargetStream
from distill.teacher import CachedTeacher
from distill.types import Batch, SampledTargets
from moe.errors import InputError


class Counting:
    """Batches of one token, which is their number."""

    def __init__(self):
        self.number = 0

    def __next__(self) -> Batch:
        self.number += 1
        tokens = np.full((1, 1), self.number)
        return Batch(tokens, tokens, tokens > 0, tokens, tokens)

    def get_state(self):
        return {'number': self.number}

    def set_state(self, state):
        self.number = state['number']


class Echo:
    """Targets that are the tokens; none of what is refused."""

    def __init__(self, refused: int | None = None):
        self.refused = refused

    def read(self, batch: Batch) -> SampledTargets:
        if batch.tokens[0, 0] == self.refused:
            raise InputError('damaged')
        return SampledTargets(batch.tokens[..., None], batch.tokens[..., None])


def test_batches_carry_their_own_targets():
    stream = TargetStream(Counting(), Echo())
    for number in range(1, 6):
        batch = next(stream)
        assert batch.tokens.item() == number
        assert CachedTeacher().targets({}, batch).ids.item() == number


@pytest.mark.parametrize('taken', [0, 1, 4])
def test_a_position_is_behind_what_was_taken_not_what_was_read(taken: int):
    stream = TargetStream(Counting(), Echo())
    for _ in range(taken):
        next(stream)
    state = stream.get_state()
    assert state == {'number': taken}
    expected = next(stream).tokens.item()
    again = TargetStream(Counting(), Echo())
    next(again)
    again.set_state(state)
    assert next(again).tokens.item() == expected == taken + 1


def test_what_cannot_be_read_is_raised_at_its_batch():
    stream = TargetStream(Counting(), Echo(refused=3))
    assert [next(stream).tokens.item() for _ in range(2)] == [1, 2]
    with pytest.raises(InputError, match='damaged'):
        next(stream)


def test_a_cached_teacher_wants_targets():
    with pytest.raises(InputError, match='needs batches that carry targets'):
        CachedTeacher().targets({}, next(Counting()))
