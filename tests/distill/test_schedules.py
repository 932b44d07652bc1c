"""Schedules against hand-worked values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.schedules import Schedule
from moe.errors import InputError


def test_hand_worked_values():
    # A cosine is at 1/2 - cos(pi f) / 2 of its way: 0, (1 - sqrt(1/2)) / 2, 1/2, 1.
    steps = jnp.array([0, 25, 50, 100, 1000])
    linear = jax.jit(jax.vmap(Schedule('linear', 2.0, 4.0, 100).at))(steps)
    np.testing.assert_allclose(linear, [2, 2.5, 3, 4, 4], rtol=1e-6)
    cosine = jax.jit(jax.vmap(Schedule('cosine', 2.0, 4.0, 100).at))(steps)
    np.testing.assert_allclose(cosine, [2, 2 + (1 - 0.5**0.5), 3, 4, 4], rtol=1e-6)
    falling = jax.jit(jax.vmap(Schedule('cosine', 1.0, 0.0, 100).at))(steps)
    np.testing.assert_allclose(falling, [1, (1 + 0.5**0.5) / 2, 0.5, 0, 0], atol=1e-6)
    assert Schedule('constant', 3.0).at(7) == 3.0


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('quadratic', 0.0, 1.0, 10), "'constant', 'linear', 'cosine'"),
        (('constant', 1.0, 2.0, 10), 'neither end nor steps'),
        (('linear', 1.0), 'needs an end'),
        (('cosine', 1.0, 2.0, 0), 'positive integer'),
        (('linear', 1.0, float('inf'), 10), 'finite'),
    ],
)
def test_bad_schedules_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Schedule(*arguments)
