"""Rows gathered and summed, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.row_gather import FEW_GATHERS, gathered_sum

S, R, D = 11, 5, 3


def operands(k, dtype):
    rng = np.random.default_rng(k)
    # The last index is past the last row: it adds nothing.
    index = rng.integers(0, S + 1, size=(R, k)).astype(np.int32)
    index[0, 0] = S
    return jnp.array(rng.normal(size=(S, D)), dtype), index


def reference(rows, index):
    padded = np.concatenate([np.asarray(rows, np.float64), np.zeros((1, D))])
    return padded[index].sum(axis=1)


@pytest.mark.parametrize('k', [1, 2, FEW_GATHERS, FEW_GATHERS + 1])
def test_sums_equal_numpy(k):
    rows, index = operands(k, 'float32')
    np.testing.assert_allclose(gathered_sum(rows, index), reference(rows, index), atol=1e-5)


@pytest.mark.parametrize('k', [FEW_GATHERS, FEW_GATHERS + 1])
def test_bfloat16_is_rounded_once(k):
    rows, index = operands(k, 'bfloat16')
    out = gathered_sum(rows, index)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), reference(rows, index), rtol=2**-8)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        rows, index = operands(2, 'float64')
        np.testing.assert_allclose(gathered_sum(rows, index), reference(rows, index), rtol=1e-14)


def test_a_few_gathers_and_their_sum_are_one_loop():
    # Large enough for XLA to write out what a single gather finds.
    rows, index = jnp.zeros((64, 64)), jnp.zeros((32, 4), jnp.int32)
    text = jax.jit(gathered_sum).lower(rows, index).compile().as_text()
    assert 'f32[32,64]' in text, 'the HLO text is not what this test reads'
    assert 'f32[32,4,64]' not in text.split('\nENTRY ', 1)[1]
