import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import row_gather, tpu_rows
from moe.dispatch import sort_by_group
from moe.row_gather import sorted_weights
from moe.tpu_rows import sum_rows


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(('found', 'shape'), [(37, (40, 3)), (48, (150, 1))])
def test_sums_equal_numpy(found, shape, dtype, monkeypatch):
    # Turns of 16 sums, so several, of which the last is not whole.
    monkeypatch.setattr(tpu_rows, 'GATHERED_BYTES', 4 * 128 * shape[1] * 16)
    rng = np.random.default_rng(0)
    source = jnp.array(rng.normal(size=(found, 128)), dtype)
    index = rng.integers(0, found + 5, size=shape)
    actual = sum_rows(source, jnp.array(index), interpret=True)
    rows = np.concatenate([np.asarray(source, np.float64), np.zeros((5, 128))])
    expected = rows[index].sum(axis=1)
    assert actual.dtype == dtype
    tolerance = 1e-6 if dtype == 'float32' else 2**-8
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=tolerance, atol=1e-6)


def test_rows_without_a_kernel_are_known():
    assert tpu_rows.fits(jnp.zeros((2, 256), jnp.bfloat16), 8)
    assert not tpu_rows.fits(jnp.zeros((2, 200), jnp.bfloat16), 8)
    assert not tpu_rows.fits(jnp.zeros((2, 256), jnp.int8), 8)
    assert tpu_rows.turn_rows(2**20, 1) == 0


@pytest.mark.parametrize('groups', [[[2, 0], [1, 2], [0, 1]], [[3, 0], [3, 3], [0, 1]], [[3, 3]]])
def test_weights_are_sorted_as_they_are_gathered(groups):
    # Three groups; those of group 3 take no part.
    plan, _ = sort_by_group(jnp.array(groups), 3)
    operands = (plan.source, plan.row.reshape(-1))
    values = jnp.arange(1.0, plan.source.size + 1)
    for sort, gather in (
        (row_gather._sorted, row_gather._found),
        (row_gather._sorted_back, row_gather._found_back),
    ):
        np.testing.assert_array_equal(sort(values, *operands), gather(values, *operands))


def test_the_gradient_of_a_weight_is_its_rows():
    plan, _ = sort_by_group(jnp.array([[1, 0], [2, 0]]), 2)
    weights = jnp.array([[0.1, 0.2], [0.3, 0.4]])
    rows, vjp = jax.vjp(lambda w: sorted_weights(w, plan.source, plan.row), weights)
    # Group 0 holds the second choice of each token, group 1 one first choice; one has no row.
    np.testing.assert_array_equal(rows, jnp.array([[0.2], [0.4], [0.1], [0.0]]))
    (gradient,) = vjp(jnp.array([[5.0], [6.0], [7.0], [8.0]]))
    np.testing.assert_array_equal(gradient, [[7, 5], [0, 6]])
