"""Experts of few rows each: every row by its own expert, in float64, whatever the tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.few_rows import few_rows_mlp, tile_size
from moe.grouped_mlp import grouped_mlp
from moe.quantised import dequantised, rounded

E, D, F, M = 5, 6, 3, 11
RNG = np.random.default_rng(0)
ROWS, WEIGHTS = RNG.normal(size=(M, D)), RNG.random((M, 1))
GATE_UP, DOWN = RNG.normal(size=(E, D, 2 * F)), RNG.normal(size=(E, F, D))


def by_row(sizes, gate_up=GATE_UP, down=DOWN):
    out = np.zeros((M, D))
    for row, e in enumerate(np.repeat(np.arange(E), sizes)):
        gate, up = np.split(ROWS[row] @ gate_up[e], 2)
        out[row] = WEIGHTS[row] * (gate / (1 + np.exp(-gate)) * up) @ down[e]
    return out


@functools.partial(jax.jit, static_argnames='size')
def tiled(sizes, size):
    arrays = (jnp.asarray(a, jnp.float32) for a in (ROWS, WEIGHTS, GATE_UP, DOWN))
    return few_rows_mlp('silu', *arrays, sizes, size=size)


@pytest.mark.parametrize('size', [1, 4, M])
@pytest.mark.parametrize(
    'sizes', [[2, 0, 5, 1, 3], [0, 0, 11, 0, 0], [1, 2, 0, 0, 4], [0] * 5, [0, 0, 0, 0, 11]]
)
def test_every_row_passes_its_own_expert(size, sizes):
    found = tiled(jnp.asarray(sizes), size)
    np.testing.assert_allclose(found, by_row(sizes), atol=2e-5)


def test_integers_are_multiplied_as_the_floats_they_stand_for():
    sizes = [2, 0, 5, 1, 3]
    rows, weights = jnp.asarray(ROWS, jnp.float32), jnp.asarray(WEIGHTS, jnp.float32)
    gate_up = rounded(jnp.asarray(GATE_UP.reshape(E, D, 2, F)), 2, batch_axes=1)
    down = rounded(jnp.asarray(DOWN), 1, batch_axes=1)
    found = jax.jit(grouped_mlp, static_argnums=5)(
        rows, weights, gate_up, down, jnp.asarray(sizes), 'silu'
    )
    floats = [np.asarray(dequantised(each, jnp.float32), np.float64) for each in (gate_up, down)]
    expected = by_row(sizes, floats[0].reshape(E, D, 2 * F), floats[1])
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_tiles_follow_the_mean_load():
    assert [tile_size(rows, 32) for rows in (3, 128, 129, 512, 513)] == [3, 4, 8, 8, None]


def test_a_pass_without_a_gradient_takes_this_loop_and_one_with_a_gradient_equals_it():
    sizes = jnp.asarray([2, 0, 5, 1, 3])
    arrays = [jnp.asarray(a, jnp.float32) for a in (ROWS, WEIGHTS, GATE_UP, DOWN)]
    arrays[2] = arrays[2].reshape(E, D, 2, F)

    def run(*arrays):
        return grouped_mlp(*arrays, sizes, 'silu')

    out, _ = jax.vjp(run, *arrays)
    np.testing.assert_allclose(jax.jit(run)(*arrays), out, atol=2e-5)
    assert jax.jit(run).lower(*arrays).as_text().count('stablehlo.while') == 1
