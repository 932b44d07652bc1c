import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import MoEConfig, RouterConfig
from moe.errors import InputError
from moe.expert_weights import split_experts, stack_experts
from moe.experts import MoELayer
from moe.sharding import MeshConfig, make_mesh

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


@pytest.mark.parametrize('dispatch', ['dense', 'capacity', 'grouped'])
def test_biases_of_router_and_experts_equal_numpy(dispatch):
    router = RouterConfig(E, K, bias=True)
    config = MoEConfig(router, expert_dim=F, dispatch=dispatch, capacity_factor=10.0, bias=True)
    layer, rng = MoELayer(config, 'clamped_swiglu'), np.random.default_rng(0)
    boxed = jax.jit(layer.init)(jax.random.key(0), tokens(), jnp.array(MASK))
    assert boxed['params']['gate_up_bias'].names == ('experts', None, 'mlp')
    assert boxed['params']['down_bias'].names == ('experts', 'embed')
    p = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), nn.unbox(boxed)['params'])
    single = jax.tree.map(lambda leaf: leaf.astype(np.float32), p)
    y, output = jax.jit(layer.apply)({'params': single}, tokens(), jnp.array(MASK))
    for b, t in np.argwhere(MASK):
        token = np.asarray(tokens()[b, t], np.float64)
        logits = token @ p['router']['kernel'] + p['router']['bias']
        np.testing.assert_allclose(output.router_logits[b, t], logits, rtol=1e-4, atol=1e-5)
        chosen = np.argsort(-logits)[:K]
        weights = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        expected = np.zeros(D)
        for e, weight in zip(chosen, weights, strict=True):
            gate, up = np.einsum('d,dcf->cf', token, p['gate_up'][e]) + p['gate_up_bias'][e]
            gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
            hidden = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
            expected += weight * (hidden @ p['down'][e] + p['down_bias'][e])
        np.testing.assert_allclose(y[b, t], expected, rtol=1e-3, atol=1e-4)


def test_jitter_is_noise_on_what_router_and_routed_experts_see_in_training_alone():
    # One expert, no shared one: the output of the layer is the expert's of the noisy input.
    config = MoEConfig(RouterConfig(1, 1, jitter=0.25), expert_dim=F)
    layer, ones, mask = MoELayer(config, 'silu'), jnp.ones((2, 500, D)), jnp.ones((2, 500), bool)
    params = jax.jit(lambda key: nn.unbox(layer.init(key, ones, mask)))(jax.random.key(0))['params']
    # The first logit is the first coordinate of what the router saw.
    params['router']['kernel'] = jnp.zeros((D, 1)).at[0].set(1.0)
    _, calm = layer.apply({'params': params}, ones, mask)
    assert np.all(calm.router_logits == 1)
    apply = functools.partial(layer.apply, {'params': params}, ones, mask)
    y, noisy = apply(rngs={'jitter': jax.random.key(1)})
    seen = np.asarray(noisy.router_logits)
    assert 0.75 <= seen.min() < 0.76 < 1.24 < seen.max() <= 1.25
    np.testing.assert_allclose(seen.std(), 0.5 / 12**0.5, rtol=0.1)
    assert np.asarray(y).std(axis=(0, 1)).min() > 1e-3
    np.testing.assert_array_equal(apply(rngs={'jitter': jax.random.key(1)})[0], y)
    assert np.any(apply(rngs={'jitter': jax.random.key(2)})[0] != y)


def test_expert_choice_and_hash_are_the_same_in_every_dispatch():
    ids = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    for choice in ('expert', 'hash'):
        outputs = []
        for dispatch in ('dense', 'capacity', 'grouped'):
            router = RouterConfig(E, K, choice=choice)
            config = MoEConfig(router, F, dispatch=dispatch, capacity_factor=10.0)
            layer = MoELayer(config, 'silu')
            variables = nn.unbox(boxed_variables())['params']
            names = ('router', 'gate_up', 'down')
            params = {'params': {name: variables[name] for name in names}}
            outputs.append(jax.jit(layer.apply)(params, tokens(), jnp.array(MASK), ids))
        for y, router in outputs[1:]:
            np.testing.assert_allclose(y, outputs[0][0], rtol=1e-4, atol=1e-5)
            assert router.dropped == 0
        load = outputs[0][1].load
        # Four and five unmasked tokens: ceil(4 * 2 / 4) + ceil(5 * 2 / 4) for each expert.
        assert np.all(load == 5) if choice == 'expert' else load.sum() == MASK.sum() * K
        assert np.abs(outputs[0][0]).max() > 0.01


def test_soft_layer_has_slots_and_passes_every_expert():
    config = MoEConfig(RouterConfig(E, E, choice='soft', slots=3, bias=True), F, bias=True)
    layer = MoELayer(config, 'silu')
    variables = jax.jit(lambda key: nn.unbox(layer.init(key, tokens(), jnp.array(MASK))))(
        jax.random.key(0)
    )
    shapes = jax.tree.map(jnp.shape, variables['params'])
    assert shapes['router'] == {'kernel': (D, E, 3), 'bias': (E, 3)}
    y, output = jax.jit(layer.apply)(variables, tokens(), jnp.array(MASK))
    np.testing.assert_allclose(output.load.sum(), MASK.sum(), rtol=1e-5)
    assert np.all(np.asarray(y)[~MASK] == 0)
    assert np.abs(np.asarray(y)[MASK]).max() > 1e-3


@pytest.mark.parametrize('bias', [False, True])
def test_experts_stored_one_by_one_compute_what_fused_ones_do(bias):
    config = MoEConfig(RouterConfig(E, K), expert_dim=F, bias=bias)
    fused = MoELayer(config, 'silu')
    separate = MoELayer(dataclasses.replace(config, storage='per_expert'), 'silu')
    x, mask = tokens(), jnp.array(MASK)
    params = nn.unbox(fused.init(jax.random.key(0), x, mask))['params']
    if bias:
        params['gate_up_bias'] = jax.random.normal(jax.random.key(2), (E, 2, F))
        params['down_bias'] = jax.random.normal(jax.random.key(3), (E, D))
    experts = split_experts(params)
    apart = {f'expert_{e}': expert for e, expert in enumerate(experts)}
    apart['router'] = params['router']
    boxed = separate.init(jax.random.key(0), x, mask)['params']
    assert jax.tree.map(jnp.shape, nn.unbox(boxed)) == jax.tree.map(jnp.shape, apart)
    assert boxed['expert_1']['up'].names == ('embed', 'mlp')
    assert boxed['expert_1']['down'].names == ('mlp', 'embed')

    def outcome(layer, params):
        y, vjp = jax.vjp(lambda params: layer.apply({'params': params}, x, mask)[0], params)
        return y, vjp(jnp.cos(y))[0]

    (y, gradient), (found, gradients) = outcome(fused, params), outcome(separate, apart)
    np.testing.assert_allclose(found, y, atol=1e-6)
    together = stack_experts([gradients[f'expert_{e}'] for e in range(E)])
    for name, value in together.items():
        np.testing.assert_allclose(value, gradient[name], atol=1e-6)


def test_an_expert_stored_by_itself_starts_with_variance_one_over_its_own_fan_in():
    config = MoEConfig(RouterConfig(2, 1), expert_dim=200, storage='per_expert')
    layer = MoELayer(config, 'silu')
    x = jnp.zeros((1, 1, 100))
    params = nn.unbox(layer.init(jax.random.key(0), x, jnp.ones((1, 1), bool)))['params']
    assert not np.array_equal(params['expert_0']['gate'], params['expert_1']['gate'])
    for name, fan_in in (('gate', 100), ('up', 100), ('down', 200)):
        np.testing.assert_allclose(np.var(params['expert_1'][name]), 1 / fan_in, rtol=0.1)


def test_experts_stored_one_by_one_are_not_copied_to_every_shard():
    config = MoEConfig(RouterConfig(E, K), expert_dim=F, storage='per_expert')
    mesh = make_mesh(MeshConfig(data=4, expert=2))
    layer = MoELayer(config, 'silu', mesh=mesh)
    with pytest.raises(InputError, match=r"expert=1; received expert=2.*moe.storage='fused'"):
        jax.eval_shape(layer.init, jax.random.key(0), tokens(), jnp.array(MASK))
