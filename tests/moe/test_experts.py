import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import MoEConfig, RouterConfig
from moe.experts import MoELayer

B, T, D, E, K, F = 2, 5, 6, 4, 2, 3
CONFIG = MoEConfig(RouterConfig(E, K, selection_bias=True), expert_dim=F, shared_dim=5)
MASK = np.array([[True] * 4 + [False], [True] * 5])


@functools.cache
def boxed_variables():
    layer = MoELayer(CONFIG, 'silu')
    return jax.jit(layer.init)(jax.random.key(0), jnp.zeros((B, T, D)), jnp.array(MASK))


def tokens() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (B, T, D))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def reference(variables, x, mask):
    """The layer in float64 NumPy, one token at a time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables['params'])
    bias = np.asarray(variables['routing']['router']['selection_bias'], np.float64)
    y, load = np.zeros(x.shape), np.zeros(E)
    for b, t in np.argwhere(mask):
        token = np.asarray(x[b, t], np.float64)
        scores = np.exp(token @ p['router']['kernel'])
        scores /= scores.sum()
        chosen = np.argsort(-(scores + bias), kind='stable')[:K]
        load[chosen] += 1
        weights = scores[chosen] / scores[chosen].sum()
        for e, weight in zip(chosen, weights, strict=True):
            gate, up = token @ p['gate_up'][e, :, 0], token @ p['gate_up'][e, :, 1]
            y[b, t] += weight * (silu(gate) * up) @ p['down'][e]
        shared = p['shared']
        gate, up = token @ shared['gate_up'][:, 0], token @ shared['gate_up'][:, 1]
        y[b, t] += (silu(gate) * up) @ shared['down']
    return y, load


@pytest.mark.parametrize('dispatch', ['dense', 'capacity', 'grouped'])
def test_layer_equals_numpy(dispatch):
    config = dataclasses.replace(CONFIG, dispatch=dispatch, capacity_factor=10.0)
    variables = nn.unbox(boxed_variables())
    bias = jnp.array([0.0, -0.5, 0.6, 0.0])
    variables = {'params': variables['params'], 'routing': {'router': {'selection_bias': bias}}}
    layer = MoELayer(config, 'silu')
    y, router = jax.jit(layer.apply)(variables, tokens(), jnp.array(MASK))
    expected, load = reference(variables, tokens(), MASK)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(router.load, load)
    assert router.load.sum() == MASK.sum() * K
    assert router.dropped == 0


def test_parameters_have_the_names_and_axes_that_others_rely_on():
    boxed = boxed_variables()
    params = boxed['params']
    assert params['gate_up'].names == ('experts', 'embed', None, 'mlp')
    assert params['down'].names == ('experts', 'mlp', 'embed')
    assert params['router']['kernel'].names == ('embed', None)
    shapes = jax.tree.map(jnp.shape, nn.unbox(boxed))
    assert shapes['params'] == {
        'router': {'kernel': (D, E)},
        'gate_up': (E, D, 2, F),
        'down': (E, F, D),
        'shared': {'gate_up': (D, 2, 5), 'down': (5, D)},
    }
    assert shapes['routing'] == {'router': {'selection_bias': (E,)}}
    assert np.all(nn.unbox(boxed)['routing']['router']['selection_bias'] == 0)


def test_each_expert_starts_with_variance_one_over_its_own_fan_in():
    config = MoEConfig(RouterConfig(8, 2), expert_dim=32)
    layer = MoELayer(config, 'silu')
    x, mask = jnp.zeros((1, 2, 64)), jnp.ones((1, 2), bool)
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x, mask))['params']
    for name, fan_in in (('gate_up', 64), ('down', 32)):
        deviations = np.asarray(params[name]).reshape(8, -1).std(axis=1)
        np.testing.assert_allclose(deviations, fan_in**-0.5, rtol=0.1)
    assert set(params) == {'router', 'gate_up', 'down'}


def test_half_precision_experts_keep_the_router_in_float32():
    variables, x, mask = nn.unbox(boxed_variables()), tokens(), jnp.array(MASK)
    wide_y, wide = jax.jit(MoELayer(CONFIG, 'silu').apply)(variables, x, mask)
    half_y, half = jax.jit(MoELayer(CONFIG, 'silu', 'bfloat16').apply)(variables, x, mask)
    assert half_y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(wide.router_logits, half.router_logits)
    np.testing.assert_array_equal(wide.expert_weights, half.expert_weights)
    np.testing.assert_allclose(half_y.astype(jnp.float32), wide_y, atol=0.05)


def test_the_router_learns_from_the_output_and_the_bias_does_not():
    variables, x, mask = nn.unbox(boxed_variables()), tokens(), jnp.array(MASK)

    def loss(variables):
        return (MoELayer(CONFIG, 'silu').apply(variables, x, mask)[0] ** 2).sum()

    gradient = jax.jit(jax.grad(loss))(variables)
    assert np.abs(gradient['params']['router']['kernel']).max() > 1e-4
    assert np.all(gradient['routing']['router']['selection_bias'] == 0)
