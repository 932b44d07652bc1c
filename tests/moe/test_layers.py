"""Norm, products and gated MLP against float64 NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.layers import (
    GatedMLP,
    RMSNorm,
    activation_fn,
    kernel_init,
    linear,
    rms_norm,
    soft_cap,
)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize('trailing', [(6,), (2, 3)])
def test_rms_norm_divides_by_the_root_mean_square_of_the_axes_of_its_scale(trailing):
    x, scale = normal(0, 3, 4, 2, 3).reshape(3, 4, *trailing), normal(1, *trailing)
    axes = tuple(range(2, x.ndim))
    expected = x / np.sqrt((x**2).mean(axes, keepdims=True) + 0.5) * scale
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(scale), 0.5), expected, 2e-6)


def test_rms_norm_squares_in_float32_and_casts_before_the_weight():
    x = jnp.array([[300.0, 400.0]], jnp.float16)  # the squares overflow float16
    scale = jnp.array([1.0, 3.0], jnp.float32)
    normed = rms_norm(x, scale, 1e-6)
    exact = np.array([300.0, 400.0]) / np.sqrt((300.0**2 + 400.0**2) / 2)
    assert normed.dtype == jnp.float16
    expected = exact.astype(np.float16) * np.array([1.0, 3.0], np.float16)
    np.testing.assert_array_equal(normed[0], expected)


def test_a_scale_less_one_multiplies_before_the_cast():
    x, stored = jnp.asarray(normal(0, 2, 3, 8), jnp.bfloat16), normal(1, 8) * 0.1
    norm = RMSNorm(1e-6, unit_offset=True, scale_float32=True)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6) * (1 + stored)
    params = {'params': {'scale': jnp.asarray(stored, jnp.float32)}}
    np.testing.assert_array_equal(norm.apply(params, x), exact.astype(jnp.bfloat16))
    assert not nn.unbox(norm.init(jax.random.key(0), x))['params']['scale'].any()


def test_soft_cap_bends_towards_the_cap():
    capped = soft_cap(jnp.array([0.0, 5.0, -500.0]), 10.0)
    np.testing.assert_allclose(capped, [0, 4.62117157, -10], rtol=1e-6)
    np.testing.assert_array_equal(soft_cap(jnp.array([500.0]), None), [500.0])


def test_linear_contracts_all_axes_after_the_second():
    x, kernel = normal(0, 2, 3, 4, 5), normal(1, 4, 5, 6, 7)
    expected = np.einsum('bthk,hkef->btef', x, kernel)
    np.testing.assert_allclose(linear(jnp.asarray(x), jnp.asarray(kernel)), expected, atol=1e-5)


def test_gated_mlp_takes_the_gate_first():
    x, gate_up, down = normal(0, 2, 3, 4), normal(1, 4, 2, 5), normal(2, 5, 4)
    params = {'params': {'gate_up': jnp.asarray(gate_up), 'down': jnp.asarray(down)}}
    y = GatedMLP(5, 'silu').apply(params, jnp.asarray(x))
    expected = (silu(x @ gate_up[:, 0]) * (x @ gate_up[:, 1])) @ down
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_activations():
    x = normal(0, 50)
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(activation_fn('silu')(jnp.asarray(x)), silu(x), atol=1e-6)
    np.testing.assert_allclose(activation_fn('gelu')(jnp.asarray(x)), tanh, atol=1e-6)


def test_kernels_begin_with_variance_one_over_fan_in():
    kernel = kernel_init(1, (2, 3), (0,))(jax.random.key(0), (3, 64, 2, 100))
    np.testing.assert_allclose(jnp.var(kernel, axis=(1, 2, 3)), np.full(3, 1 / 64), rtol=0.05)
