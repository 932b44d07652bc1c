"""The kernels of the whole MLP, interpreted, against float64 one row at a time."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from moe import tpu_grouped
from moe.grouped_mlp import _looped, _looped_backward
from moe.tpu_windows import TILE, from_windows, most_windows, to_windows, windows

# Off the tile everywhere; three parts of the hidden columns; groups of several windows.
M, D, F = 301, 136, 300
SIZES = {
    'two windows, empty, sharing a tile': [150, 0, 3, 0, 4, 130],
    'one takes all': [0, 0, 301, 0, 0, 0],
    'nothing': [0, 0, 0, 0, 0, 0],
}
# What was never written is not a number, and a copy happens no sooner than it is waited for.
INTERPRET = pltpu.InterpretParams()
SETTINGS = {'most_rows': 128, 'interpret': INTERPRET}


def reference(operands, sizes, cotangent):
    """Outputs and gradients of silu experts, from derivatives written out by hand."""
    rows, weights, gate_up, down = (np.asarray(a, np.float64) for a in operands)
    dy = np.asarray(cotangent, np.float64)
    out, d_rows, d_weights = np.zeros_like(rows), np.zeros_like(rows), np.zeros_like(weights)
    d_gate_up, d_down = np.zeros_like(gate_up), np.zeros_like(down)
    gate_up, d_sides = gate_up.reshape(-1, D, 2, F), d_gate_up.reshape(-1, D, 2, F)
    for e, (size, end) in enumerate(zip(sizes, np.cumsum(sizes), strict=True)):
        of = slice(end - size, end)
        x, w, by = rows[of], weights[of], dy[of]
        gate, up = x @ gate_up[e, :, 0], x @ gate_up[e, :, 1]
        s = 1 / (1 + np.exp(-gate))
        hidden, d_hidden = gate * s * up, by @ down[e].T
        out[of] = w * hidden @ down[e]
        d_weights[of] = (d_hidden * hidden).sum(axis=1, keepdims=True)
        d_gate, d_up = w * d_hidden * up * (s + gate * s * (1 - s)), w * d_hidden * gate * s
        d_down[e] = (w * hidden).T @ by
        d_sides[e, :, 0], d_sides[e, :, 1] = x.T @ d_gate, x.T @ d_up
        d_rows[of] = d_gate @ gate_up[e, :, 0].T + d_up @ gate_up[e, :, 1].T
    return out, d_rows, d_weights, d_gate_up, d_down


@functools.cache
def operands(dtype):
    rng = np.random.default_rng(0)
    shapes = ((M, D), (6, D, 2 * F), (6, F, D), (M, D))
    rows, gate_up, down, by = (jnp.array(rng.normal(size=s) / s[-1] ** 0.25, dtype) for s in shapes)
    weights = jnp.array(rng.uniform(0.1, 1, size=(M, 1)), jnp.float32)
    return (rows, weights, gate_up, down), by


@pytest.mark.parametrize(
    ('case', 'dtype'), [*((case, 'float32') for case in SIZES), (next(iter(SIZES)), 'bfloat16')]
)
def test_equals_float64(case, dtype):
    arrays, cotangent = operands(dtype)
    sizes = jnp.array(SIZES[case])
    out, both = tpu_grouped.forward('silu', True, *arrays, sizes, **SETTINGS)
    gradients = tpu_grouped.backward('silu', *arrays, sizes, both, cotangent, **SETTINGS)
    names = ('out', 'rows', 'weights', 'gate_up', 'down')
    expected = reference(arrays, SIZES[case], cotangent)
    for name, actual, want in zip(names, (out, *gradients), expected, strict=True):
        actual = np.asarray(actual, np.float64)
        assert actual.shape == want.shape, name
        # Roundings to eight bits between products; float32's are far smaller.
        error, scale = np.abs(actual - want).max(), max(np.abs(want).max(), 1e-30)
        assert error <= (2e-5 if dtype == 'float32' else 2e-2) * scale, (name, error, scale)
        if name in ('out', 'rows', 'weights'):
            np.testing.assert_array_equal(actual[sum(SIZES[case]) :], 0)


@pytest.mark.parametrize('activation', ['gelu', 'clamped_swiglu'])
def test_other_activations_equal_the_loop(activation):
    arrays, cotangent = operands('float32')
    sizes = jnp.array([150, 0, 3, 0, 4, 130])
    out, both = tpu_grouped.forward(activation, True, *arrays, sizes, **SETTINGS)
    gradients = tpu_grouped.backward(activation, *arrays, sizes, both, cotangent, **SETTINGS)
    expected, kept = _looped(activation, True, *arrays, sizes)
    others = _looped_backward(activation, *arrays, sizes, kept, cotangent)
    for actual, want in zip((out, *gradients), (expected, *others), strict=True):
        scale = np.abs(want).max()
        np.testing.assert_allclose(actual, want, atol=2e-5 * scale)


def test_windows_are_up_to_so_many_rows_of_one_group():
    # From row 150, which is the seventh of tile 9. Of the last group 16 * 9 + 128 = 272 is the end
    # of its first window.
    turns = windows(jnp.array([150, 0, 140]), 304, 128)
    assert len(turns.group) == most_windows(304, 3, 128) == 7
    np.testing.assert_array_equal(turns.group[:6], [0, 0, 1, 2, 2, 3])
    np.testing.assert_array_equal(turns.tile[:6], [0, 8, 9, 9, 17, 18])
    np.testing.assert_array_equal(turns.low[:6], [0, 0, 6, 6, 0, 2])
    np.testing.assert_array_equal(turns.high[:6], [128, 22, 0, 128, 18, 16])
    np.testing.assert_array_equal(turns.begins[:6], [1, 0, 1, 1, 0, 1])
    np.testing.assert_array_equal(turns.weights[:6], [0, 0, 0, 2, 2, 2])
    assert turns.group[6] > 3
    assert turns.high[6] == 0


def test_values_go_to_windows_and_back():
    # Three in the first tile, an empty one among them; one that ends on a tile, and rows of none.
    sizes = jnp.array([5, 0, 2, 281, 0, 3, 20])
    turns = windows(sizes, 20 * TILE, 128)
    values = jnp.arange(1.0, 20 * TILE + 1)[:, None]
    laid = to_windows(values, turns, 128)
    assert laid[turns.group < 7].sum() == values[:311].sum()
    laid = jnp.where((turns.group < 7)[:, None, None], laid, 0)
    back = from_windows(laid, turns, 20 * TILE, 7)
    np.testing.assert_array_equal(back[:311], values[:311])
    np.testing.assert_array_equal(back[311:], 0)


def test_operands_without_kernels_are_known():
    (rows, _, gate_up, down), _ = operands('float32')
    assert tpu_grouped.fits(rows, gate_up, down)
    assert not tpu_grouped.fits(rows.astype('bfloat16'), gate_up, down)
    wide = jnp.zeros((1, 1, 1), jnp.float32)
    assert not tpu_grouped.fits(rows, wide, jnp.broadcast_to(wide, (1, 128, 2**18)))
