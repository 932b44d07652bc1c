"""The experts' MLP on sorted rows, in both forms, against float64 one row at a time."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import grouped_mlp as module
from moe.grouped_mlp import grouped_mlp

# Odd everywhere, and several of the largest tiles.
M, D, F, E = 333, 7, 5, 6
SIZES = {
    'uneven': [1, 64, 31, 33, 103, 101],
    'empty groups': [0, 300, 0, 0, 33, 0],
    'one takes all': [0, 0, 333, 0, 0, 0],
    'rows past the last group': [5, 0, 260, 1, 32, 7],
    'nothing': [0, 0, 0, 0, 0, 0],
}


def silu(x):
    return x / (1 + np.exp(-x))


def reference(rows, weights, gate_up, down, sizes, cotangent):
    """The output and the four gradients, from derivatives written out by hand."""
    out, d_rows, d_weights = np.zeros(rows.shape), np.zeros(rows.shape), np.zeros(weights.shape)
    d_gate_up, d_down = np.zeros(gate_up.shape), np.zeros(down.shape)
    for row, e in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        x, w, dy = rows[row], weights[row, 0], cotangent[row]
        gate, up = x @ gate_up[e, :, 0], x @ gate_up[e, :, 1]
        hidden = silu(gate) * up
        out[row] = w * hidden @ down[e]
        d_hidden = down[e] @ dy
        d_weights[row, 0] = d_hidden @ hidden
        s = 1 / (1 + np.exp(-gate))
        d_gate = w * d_hidden * up * (s + gate * s * (1 - s))
        d_up = w * d_hidden * silu(gate)
        d_down[e] += w * np.outer(hidden, dy)
        d_gate_up[e] += np.stack([np.outer(x, d_gate), np.outer(x, d_up)], axis=1)
        d_rows[row] = gate_up[e, :, 0] @ d_gate + gate_up[e, :, 1] @ d_up
    return out, d_rows, d_weights, d_gate_up, d_down


@functools.cache
def operands(dtype='float32'):
    rng = np.random.default_rng(0)
    shapes = ((M, D), (E, D, 2, F), (E, F, D), (M, D))
    rows, gate_up, down, cotangent = (jnp.array(rng.normal(size=s), dtype) for s in shapes)
    weights = jnp.array(rng.uniform(0.1, 1, size=(M, 1)), jnp.float32)
    return rows, weights, gate_up, down, cotangent


@jax.jit
def cpu(rows, weights, gate_up, down, sizes, cotangent):
    def run(rows, weights, gate_up, down):
        return grouped_mlp(rows, weights, gate_up, down, sizes, 'silu')

    out, vjp = jax.vjp(run, rows, weights, gate_up, down)
    return out, *vjp(cotangent)


@jax.jit
def accelerator(rows, weights, gate_up, down, sizes, cotangent):
    """What the other platforms run; here `ragged_dot` expands, with the same meaning."""
    arguments = (rows, weights, gate_up.reshape(E, D, -1), down, sizes)
    out, both = module._ragged('silu', True, *arguments)
    gradients = module._ragged_backward('silu', *arguments, both, cotangent)
    d_rows, d_weights, d_gate_up, d_down = gradients
    return out, d_rows, d_weights, d_gate_up.reshape(gate_up.shape), d_down


def check(compute, sizes, dtype, tolerance):
    *arrays, cotangent = operands(dtype)
    wide = [np.asarray(a, np.float64) for a in arrays]
    expected = reference(*wide, sizes, np.asarray(cotangent, np.float64))
    actual = compute(*arrays, jnp.array(sizes, jnp.int32), cotangent)
    for got, want in zip(actual, expected, strict=True):
        scale = max(1.0, np.abs(want).max())
        difference = np.abs(np.asarray(got, np.float64) - want).max() / scale
        assert difference < tolerance
    return actual


@pytest.mark.parametrize('compute', [cpu, accelerator], ids=['cpu', 'accelerator'])
@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES.keys())
def test_equals_float64(sizes, compute):
    actual = check(compute, sizes, 'float32', 3e-6)
    past = sum(sizes)
    for rows in actual[:3]:
        assert np.all(np.asarray(rows)[past:] == 0)


@pytest.mark.parametrize('compute', [cpu, accelerator], ids=['cpu', 'accelerator'])
def test_bfloat16_accumulates_in_float32(compute):
    for name in ('uneven', 'rows past the last group'):
        actual = check(compute, SIZES[name], 'bfloat16', 2e-2)
        assert actual[0].dtype == jnp.bfloat16


def test_gradients_have_the_dtypes_of_what_they_belong_to():
    *arrays, cotangent = operands('bfloat16')
    actual = cpu(*arrays, jnp.array(SIZES['uneven']), cotangent)
    assert [g.dtype for g in actual[1:]] == [a.dtype for a in arrays]


def test_float64_stays_float64():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        shapes = ((40, D), (40, 1), (3, D, 2, F), (3, F, D), (40, D))
        arrays = [rng.normal(size=shape) for shape in shapes]
        sizes = [11, 0, 25]
        actual = cpu(*map(jnp.array, arrays[:4]), jnp.array(sizes), jnp.array(arrays[4]))
        expected = reference(*arrays[:4], sizes, arrays[4])
        for got, want in zip(actual, expected, strict=True):
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_garbage_past_the_last_group_stays_there():
    rows, weights, gate_up, down, cotangent = operands()
    sizes = jnp.array(SIZES['rows past the last group'])
    clean = cpu(rows, weights, gate_up, down, sizes, cotangent)
    dirty_rows, dirty_cotangent = rows.at[305:].set(1e4), cotangent.at[305:].set(1e4)
    dirty = cpu(dirty_rows, weights, gate_up, down, sizes, dirty_cotangent)
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


def array_shapes(text):
    return {tuple(map(int, s.split(','))) for s in re.findall(r'f32\[([\d,]+)\]', text)}


def test_the_cpu_program_has_neither_a_dense_expansion_nor_a_copy_of_transposed_weights():
    *arrays, cotangent = operands()
    program = cpu.lower(*arrays, jnp.array(SIZES['uneven']), cotangent).compile()
    shapes = array_shapes(program.as_text())
    assert (M, D) in shapes, 'the HLO text is not what this test reads'
    most = max(M * D, M * 2 * F, E * D * 2 * F)
    assert max(int(np.prod(shape)) for shape in shapes) <= most
    assert not {(E, 2 * F, D), (E, D, F)} & shapes


def test_without_gradients_nothing_is_kept_of_the_hidden_layer():
    *arrays, _ = operands()
    forward = jax.jit(lambda *arrays: grouped_mlp(*arrays, 'silu'))
    text = forward.lower(*arrays, jnp.array(SIZES['uneven'])).compile().as_text()
    assert (M, D) in array_shapes(text)
    assert (M, 2 * F) not in array_shapes(text)


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_other_platforms_are_given_kernels_or_ragged_products(platform):
    *arrays, cotangent = operands()
    traced = cpu.trace(*arrays, jnp.array(SIZES['uneven']), cotangent)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    # On TPU a kernel of ours each way; else two forward, and backward one each for the hidden layer
    # and the rows, and two for the weights.
    kernels = text.count('tpu_custom_call')
    assert (text.count('"chlo.ragged_dot"('), kernels) == ((0, 2) if platform == 'tpu' else (6, 0))
    assert 'stablehlo.while' not in text
    assert f'tensor<{E}x{M}x' not in text
