"""Experts measured, left out, merged and made dense again: planted and hand-worked cases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe.config import AttentionConfig, MoEConfig, TransformerConfig
from moe.densify import average_experts, concatenate_experts
from moe.errors import InputError
from moe.fewer_experts import best_experts, prune_experts
from moe.merge import average, cluster_experts, merge_experts, weight_features
from moe.observe import Calibration
from moe.routing import RouterConfig
from moe.saliency import expert_saliency
from moe.sharding import abstract_variables
from moe.transformer import Transformer
from moe.upcycle import upcycle

ATTENTION = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4)
ROUTER = RouterConfig(4, 2, scale=1.5, selection_bias=True, bias=True)
MOE = MoEConfig(ROUTER, expert_dim=6, shared_dim=3, dispatch='dense', first_dense_layers=1)
CONFIG = TransformerConfig(19, 3, 8, 12, ATTENTION, MOE)
TOKENS = jax.random.randint(jax.random.key(1), (2, 7), 0, 19)
SEGMENTS = jnp.ones((2, 7), jnp.int32).at[1, 4:].set(0)
VARIABLES = jax.jit(lambda key: nn.unbox(Transformer(CONFIG).init(key, TOKENS)))(jax.random.key(0))
PARAMS, ROUTING = VARIABLES['params'], VARIABLES['routing']


def run(config: TransformerConfig, params, routing=None, segment_ids=None):
    variables = {'params': params, 'routing': routing or {}}
    return jax.jit(Transformer(config).apply)(variables, TOKENS, segment_ids=segment_ids)


def experts_of(params):
    """Returns the stacked parameters of the MoE layers, and the path back to the whole."""
    return next(
        layer['moe']
        for group in sorted(params)
        if group.startswith('group')
        for layer in params[group].values()
        if 'moe' in layer
    )


def with_experts(params, change):
    """Replaces the stacked parameters of the MoE layers by `change(them)`."""
    changed = {name: dict(value) for name, value in params.items()}
    for group in changed:
        for name, layer in changed[group].items():
            if isinstance(layer, dict) and 'moe' in layer:
                changed[group][name] = {**layer, 'moe': change(layer['moe'])}
    return changed


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


def built_as(config, params, routing) -> bool:
    made = {'params': params, 'routing': routing} if routing else {'params': params}
    return shapes(made) == shapes(abstract_variables(Transformer(config)))


def test_saliency_against_numpy():
    saliency = jax.tree.map(
        np.asarray, expert_saliency(Transformer(CONFIG), VARIABLES, Calibration(TOKENS, SEGMENTS))
    )
    output = run(CONFIG, PARAMS, ROUTING, SEGMENTS)
    mask = np.asarray(SEGMENTS) > 0
    assert saliency.frequency.shape == (2, 4)
    for layer, router in enumerate(output.router):
        ids, weights = np.asarray(router.expert_ids)[mask], np.asarray(router.expert_weights)[mask]
        for e in range(4):
            here = np.where(ids == e, weights, 0.0).sum(axis=1)
            np.testing.assert_allclose(saliency.weight[layer, e], here.mean(), rtol=1e-5)
            frequency = (ids == e).any(axis=1).mean()
            np.testing.assert_allclose(saliency.frequency[layer, e], frequency, rtol=1e-5)
    np.testing.assert_allclose(saliency.frequency.sum(axis=1), 2.0, rtol=1e-5)
    np.testing.assert_allclose(saliency.weight.sum(axis=1), 1.5, rtol=1e-5)


def test_activation_of_an_expert_whose_output_is_known():
    # A linear model of one layer: hidden state, experts and weights all by hand.
    moe = MoEConfig(RouterConfig(2, 1, normalize='none'), expert_dim=1, dispatch='dense')
    config = TransformerConfig(3, 1, 2, 1, AttentionConfig(1, 1, 2), moe, norm_eps=1e-12)
    params = jax.jit(lambda key: nn.unbox(Transformer(config).init(key, TOKENS)))(
        jax.random.key(0)
    )['params']
    layer = params['group_0']['layer_0']
    layer['attention']['o'] = jnp.zeros_like(layer['attention']['o'])
    params['embed']['embedding'] = jnp.array([[3.0, 0.0], [0.0, 3.0], [0.0, -3.0]])
    # After the norm: sqrt(2) times a unit vector. Token 0 chooses expert 0, the others expert 1.
    r = 2**0.5
    layer['moe']['router']['kernel'] = jnp.array([[[2.0 / r, 0.0], [0.0, 1.0 / r]]])
    # gate 20 -> silu 20; up 1; down of norm 5 and 0.5.
    layer['moe']['gate_up'] = jnp.array(
        [[[[[20 / r], [1 / r]], [[20 / r], [1 / r]]], [[[20 / r], [1 / r]], [[20 / r], [1 / r]]]]]
    )
    layer['moe']['down'] = jnp.array([[[[3.0, 4.0]], [[0.5, 0.0]]]])
    tokens = jnp.array([[0, 0, 1, 1]])
    saliency = expert_saliency(Transformer(config), {'params': params}, Calibration(tokens))
    first, second = 1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(saliency.frequency, [[0.5, 0.5]], rtol=1e-5)
    np.testing.assert_allclose(saliency.weight, [[first / 2, second / 2]], rtol=1e-5)
    expected = [[first * 20 * 5, second * 20 * 0.5]]
    np.testing.assert_allclose(saliency.activation, expected, rtol=1e-5)
    np.testing.assert_allclose(saliency.output, [[[60.0, 80.0], [10.0, 0.0]]], rtol=1e-5)


def test_best_experts_by_hand():
    scores = np.array([[1.0, 5.0, 5.0, 2.0], [0.0, 0.0, 0.0, 1.0]])
    assert best_experts(scores, 2).tolist() == [[1, 2], [0, 3]]
    assert best_experts(scores, 2, num_groups=2).tolist() == [[1, 2], [0, 3]]
    assert best_experts(np.array([[4.0, 3.0, 2.0, 1.0]]), 2, num_groups=2).tolist() == [[0, 2]]


def test_experts_that_none_chooses_can_be_pruned():
    # A bias of the router that only experts 1 and 3 survive; selection biases that agree.
    def close(moe):
        bias = jnp.array([-50.0, 0.0, -50.0, 0.0]) * jnp.ones((2, 1))
        return {**moe, 'router': {**moe['router'], 'bias': bias}}

    params = with_experts(PARAMS, close)
    routing = jax.tree.map(lambda x: x + jnp.array([0.1, 0.25, 0.15, 0.3]), ROUTING)
    saliency = expert_saliency(
        Transformer(CONFIG), {'params': params, 'routing': routing}, Calibration(TOKENS)
    )
    keep = best_experts(np.asarray(saliency.activation), 2)
    assert keep.tolist() == [[1, 3], [1, 3]]
    config, smaller, biases = prune_experts(CONFIG, params, routing, keep)
    assert built_as(config, smaller, biases)
    np.testing.assert_allclose(jax.tree.leaves(biases)[0], [[0.25, 0.3]] * 2, rtol=1e-6)
    kernel = experts_of(params)['router']['kernel']
    np.testing.assert_array_equal(experts_of(smaller)['router']['kernel'], kernel[..., [1, 3]])
    expected = run(CONFIG, params, routing).logits
    np.testing.assert_allclose(run(config, smaller, biases).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ('keep', 'message'),
    [
        ([[0, 1]], 'each of the 2 MoE layers'),
        ([[0, 1], [0]], 'each of the 2 MoE layers'),
        ([[0, 0], [0, 1]], 'distinct'),
        ([[0, 4], [0, 1]], 'distinct'),
        ([[0], [1]], 'experts_per_token'),
    ],
)
def test_experts_that_cannot_be_kept_are_refused(keep, message):
    with pytest.raises(InputError, match=message):
        prune_experts(CONFIG, PARAMS, ROUTING, keep)


def test_groups_are_pruned_evenly_or_not_at_all():
    router = RouterConfig(4, 1, num_groups=2, groups_kept=2, selection_bias=True, bias=True)
    config = dataclasses.replace(CONFIG, moe=dataclasses.replace(MOE, router=router))
    with pytest.raises(InputError, match='2 groups'):
        prune_experts(config, PARAMS, ROUTING, [[0, 1], [0, 2]])
    with pytest.raises(InputError, match='no groups'):
        merge_experts(config, PARAMS, ROUTING, np.zeros((2, 4), int), np.ones((2, 4)))


def test_average_linkage_by_hand():
    # On a line; the twins first, then 1.5 to them. 3.1 is 2.6 from the three on average (1.6 from
    # the nearest, 2.35 with both parts counted alike) and 2.5 from 5.6.
    rows = np.array([0.0, 3.1, 0.0, 1.5, 5.6])[None, :, None]
    assert cluster_experts(rows, 5).tolist() == [[0, 1, 2, 3, 4]]
    assert cluster_experts(rows, 4).tolist() == [[0, 1, 0, 2, 3]]
    assert cluster_experts(rows, 3).tolist() == [[0, 1, 0, 0, 2]]
    assert cluster_experts(rows, 2).tolist() == [[0, 1, 0, 0, 1]]
    assert cluster_experts(rows, 1).tolist() == [[0, 0, 0, 0, 0]]


def twins(moe):
    """Makes experts 2 and 3 permutations of 1 and 0, with their router columns."""
    order = np.array([3, 1, 0, 5, 4, 2])
    gate_up, down = moe['gate_up'], moe['down']
    for copy, original in ((2, 1), (3, 0)):
        gate_up = gate_up.at[:, copy].set(gate_up[:, original][..., order])
        down = down.at[:, copy].set(down[:, original][:, order])
    kernel = moe['router']['kernel'][..., np.array([0, 1, 1, 0])]
    return {**moe, 'gate_up': gate_up, 'down': down, 'router': {**moe['router'], 'kernel': kernel}}


def test_permuted_twins_merge_into_what_they_were():
    params = with_experts(PARAMS, twins)
    features = weight_features(CONFIG, params)
    clusters = cluster_experts(features, 2)
    assert clusters.tolist() == [[0, 1, 1, 0]] * 2
    saliency = expert_saliency(
        Transformer(CONFIG), {'params': params, 'routing': ROUTING}, Calibration(TOKENS)
    )
    assert cluster_experts(np.asarray(saliency.output), 2).tolist() == clusters.tolist()
    # With equal columns a token's best two are twins: together they are one of the merged.
    shares = np.array([[1.0, 2.0, 3.0, 4.0]] * 2)
    config, merged, biases = merge_experts(
        CONFIG, params, ROUTING, clusters, shares, experts_per_token=1
    )
    assert built_as(config, merged, biases)
    expected = run(CONFIG, params, ROUTING).logits
    np.testing.assert_allclose(run(config, merged, biases).logits, expected, atol=1e-5)


def test_the_mean_is_weighted_and_aligned_with_the_weightiest():
    gate_up = jnp.array([[[[1.0, 8.0], [2.0, 9.0]]], [[[8.0, 3.0], [9.0, 4.0]]]])
    down = jnp.array([[[1.0], [8.0]], [[8.0], [3.0]]])
    mean = average({'gate_up': gate_up, 'down': down}, np.array([0.25, 0.75], np.float32))
    np.testing.assert_allclose(mean['gate_up'], [[[8.0, 2.5], [9.0, 3.5]]])
    np.testing.assert_allclose(mean['down'], [[8.0], [2.5]])


def test_router_columns_and_biases_are_averaged_by_saliency():
    routing = jax.tree.map(lambda x: x + jnp.array([1.0, 2.0, 3.0, 4.0]), ROUTING)
    shares = np.array([[1.0, 0.0, 3.0, 0.0]] * 2)
    clusters = np.array([[0, 1, 0, 1]] * 2)
    _, merged, biases = merge_experts(CONFIG, PARAMS, routing, clusters, shares)
    # 1/4 and 3/4 of experts 0 and 2; the cluster without saliency evenly.
    np.testing.assert_allclose(jax.tree.leaves(biases)[0], [[2.5, 3.0]] * 2)
    kernel = np.asarray(experts_of(PARAMS)['router']['kernel'])
    expected = np.stack([kernel[..., [0, 2]] @ [0.25, 0.75], kernel[..., [1, 3]].mean(-1)], -1)
    np.testing.assert_allclose(experts_of(merged)['router']['kernel'], expected, atol=1e-6)
    with pytest.raises(InputError, match='at least once'):
        merge_experts(CONFIG, PARAMS, routing, clusters * 2, shares)


def test_experts_of_constant_weight_concatenate_exactly():
    # All four chosen, the router blind: 1.5 / 4 for each, whatever the token. Widths: 3 + 24.
    router = RouterConfig(4, 4, scale=1.5)
    moe = dataclasses.replace(MOE, router=router, layers=(0, 1, 2))
    config = dataclasses.replace(CONFIG, moe=moe)
    params = jax.jit(lambda key: nn.unbox(Transformer(config).init(key, TOKENS)))(
        jax.random.key(3)
    )['params']
    blind = with_experts(params, lambda m: {**m, 'router': {'kernel': 0 * m['router']['kernel']}})
    weights = np.full((3, 4), 1.5 / 4)
    dense, mlps = concatenate_experts(config, blind, weights, 4)
    assert dense.mlp_dim == 27
    assert built_as(dense, mlps, {})
    expected = run(config, blind).logits
    np.testing.assert_allclose(run(dense, mlps).logits, expected, atol=1e-5)
    # Of weights 3, 1, 2, 0 the best two bear 6: 3.6 and 2.4.
    _, mlps = concatenate_experts(config, params, np.array([[3.0, 1.0, 2.0, 0.0]] * 3), 2)
    down = np.asarray(params['group_0']['layer_0']['moe']['down'])
    made = np.asarray(mlps['group_0']['layer_0']['mlp']['down'])[:, 3:]
    np.testing.assert_allclose(made[:, :6], 3.6 * down[:, 0], rtol=1e-5)
    np.testing.assert_allclose(made[:, 6:], 2.4 * down[:, 2], rtol=1e-5)


def test_copies_of_one_mlp_become_it_again():
    dense = TransformerConfig(19, 2, 8, 12, ATTENTION)
    params = jax.jit(lambda key: nn.unbox(Transformer(dense).init(key, TOKENS)))(jax.random.key(3))[
        'params'
    ]
    moe = MoEConfig(RouterConfig(3, 1, normalize='after'), expert_dim=8, shared_dim=4)
    config, experts, _ = upcycle(dense, params, moe, key=jax.random.key(4))
    weights = np.array([[0.5, 0.2, 0.3]] * 2)
    for again in (
        average_experts(config, experts, weights),
        concatenate_experts(config, experts, weights, 1),
    ):
        assert again[0] == dense
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), again[1], params)


def test_dense_layers_of_another_width_are_refused():
    with pytest.raises(InputError, match='mlp_dim=12'):
        concatenate_experts(CONFIG, PARAMS, np.ones((2, 4)), 2)
    narrow = dataclasses.replace(CONFIG, mlp_dim=9)
    with pytest.raises(InputError, match='zero or more'):
        average_experts(narrow, PARAMS, np.zeros((2, 4)))
    with pytest.raises(InputError, match='it is dense'):
        average_experts(dataclasses.replace(CONFIG, moe=None), PARAMS, np.ones((2, 4)))
