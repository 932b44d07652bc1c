import jax.numpy as jnp
import numpy as np
import pytest

from moe import tpu_kernels
from moe.tpu_kernels import outer_products, visits


def test_a_turn_takes_the_rows_of_one_group_in_one_tile():
    # 384 rows in three tiles: 100 of group 0, none of 1, 200 of 2 in all tiles; 84 of no group.
    turns = visits(jnp.array([100, 0, 200]), 384)
    np.testing.assert_array_equal(turns.group, [0, 1, 2, 2, 2, 3])
    np.testing.assert_array_equal(turns.tile[:5], [0, 0, 0, 1, 2])
    np.testing.assert_array_equal(turns.start[:5], [0, 100, 100, 100, 100])
    np.testing.assert_array_equal(turns.end[:5], [100, 100, 300, 300, 300])


@pytest.mark.parametrize(
    'sizes',
    [[300, 0, 33, 0], [0, 0, 0, 333], [64, 64, 128, 77], [5, 260, 0, 32], [0, 0, 0, 0]],
    ids=['empty groups', 'one takes all', 'ends on tiles', 'rows past the last group', 'nothing'],
)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_equals_float64(sizes, dtype, monkeypatch):
    # Several blocks, of which the last are not whole.
    monkeypatch.setattr(tpu_kernels, 'BLOCK', (16, 128))
    monkeypatch.setattr(tpu_kernels, 'NARROW_BLOCK', (32, 128))
    rng = np.random.default_rng(0)
    lhs, rhs = (jnp.array(rng.normal(size=(333, width)), dtype) for width in (40, 200))
    actual = outer_products(lhs, rhs, jnp.array(sizes), dtype=dtype, interpret=True)
    wide = [np.asarray(rows, np.float64) for rows in (lhs, rhs)]
    ends = np.cumsum(sizes)
    expected = np.stack(
        [
            wide[0][end - size : end].T @ wide[1][end - size : end]
            for size, end in zip(sizes, ends, strict=True)
        ]
    )
    assert actual.dtype == dtype
    # A sum in float32 is rounded once: to eight bits by at most one part in 2^8.
    tolerance = 1e-4 if dtype == 'float32' else 2**-8
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=tolerance, atol=1e-4)
