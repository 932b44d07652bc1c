import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import grouped_matmul as module
from moe.grouped_matmul import grouped_matmul

# 333 rows: above the largest tile, and no multiple of any. Odd everywhere.
N, D, F, E = 333, 7, 5, 6
SIZES = {
    'uneven': [1, 64, 31, 33, 103, 101],
    'empty groups': [0, 300, 0, 0, 33, 0],
    'one takes all': [0, 0, 333, 0, 0, 0],
    'rows past the last group': [5, 0, 260, 1, 32, 7],
    'tail smaller than a tile': [0, 0, 0, 0, 332, 1],
    'nothing': [0, 0, 0, 0, 0, 0],
}


def reference(lhs, rhs, sizes, cotangent):
    """The product and both gradients in float64, one row at a time."""
    out, d_lhs, d_rhs = np.zeros((len(lhs), rhs.shape[2])), np.zeros(lhs.shape), np.zeros(rhs.shape)
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        out[row] = lhs[row] @ rhs[group]
        d_lhs[row] = rhs[group] @ cotangent[row]
        d_rhs[group] += np.outer(lhs[row], cotangent[row])
    return out, d_lhs, d_rhs


@functools.cache
def operands(dtype: str):
    rng = np.random.default_rng(0)
    shapes = ((N, D), (E, D, F), (N, F))
    return tuple(jnp.array(rng.normal(size=shape), dtype) for shape in shapes)


@jax.jit
def product_and_gradients(lhs, rhs, sizes, cotangent):
    out, vjp = jax.vjp(lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes), lhs, rhs)
    return out, *vjp(cotangent)


@jax.jit
def accelerator_product_and_gradients(lhs, rhs, sizes, cotangent):
    return (
        module.ragged(lhs, rhs, sizes),
        module.ragged_transposed(cotangent, rhs, sizes),
        module.ragged_outer(lhs, cotangent, sizes),
    )


def check(compute, sizes, dtype, tolerance):
    lhs, rhs, cotangent = operands(dtype)
    wide = [np.asarray(a, np.float64) for a in (lhs, rhs)]
    expected = reference(*wide, sizes, np.asarray(cotangent, np.float64))
    actual = compute(lhs, rhs, jnp.array(sizes, jnp.int32), cotangent)
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance * 10
        )


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES.keys())
def test_equals_float64_and_zero_past_the_last_group(sizes):
    check(product_and_gradients, sizes, 'float32', 1e-5)


@pytest.mark.parametrize('sizes', [SIZES['uneven'], SIZES['rows past the last group']])
def test_bfloat16_accumulates_in_float32(sizes):
    check(product_and_gradients, sizes, 'bfloat16', 8e-3)
    assert (
        product_and_gradients(*operands('bfloat16')[:2], jnp.array(sizes), operands('bfloat16')[2])[
            0
        ].dtype
        == jnp.bfloat16
    )


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES.keys())
def test_the_accelerators_form_gives_the_same_answer(sizes):
    check(accelerator_product_and_gradients, sizes, 'float32', 1e-5)


@pytest.mark.parametrize('rows', [1, 31, 32, 40])
def test_few_rows(rows):
    rng = np.random.default_rng(rows)
    lhs, rhs, cotangent = (rng.normal(size=s) for s in ((rows, D), (3, D, F), (rows, F)))
    sizes = [rows // 2, 0, rows - rows // 2]
    f32 = [jnp.array(a, jnp.float32) for a in (lhs, rhs, cotangent)]
    actual = product_and_gradients(f32[0], f32[1], jnp.array(sizes), f32[2])
    for got, want in zip(actual, reference(lhs, rhs, sizes, cotangent), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_garbage_past_the_last_group_stays_there():
    lhs, rhs, cotangent = operands('float32')
    sizes = jnp.array([5, 0, 260, 1, 32, 7])
    clean = product_and_gradients(lhs, rhs, sizes, cotangent)
    dirty = product_and_gradients(lhs.at[305:].set(1e30), rhs, sizes, cotangent.at[305:].set(1e30))
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


def test_compiled_program_holds_no_dense_expansion():
    lhs, rhs, cotangent = operands('float32')
    sizes = jnp.array(SIZES['uneven'])
    text = product_and_gradients.lower(lhs, rhs, sizes, cotangent).compile().as_text()
    shapes = re.findall(r'f32\[([\d,]+)\]', text)
    elements = {shape: int(np.prod([int(d) for d in shape.split(',')])) for shape in shapes}
    assert elements, 'no float32 arrays found: the HLO text is not what this test reads'
    largest = max(N * D, N * F, E * D * F)
    assert max(elements.values()) <= largest, {s: n for s, n in elements.items() if n > largest}

    expanded = jax.jit(module.ragged).lower(lhs, rhs, sizes).compile().as_text()
    assert f'{E},{N}' in expanded, 'ragged_dot no longer expands on CPU: the loop may be dropped'
