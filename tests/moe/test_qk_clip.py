"""QK-clip by hand, and by what it is for: the same queries and keys then reach the threshold."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    TransformerConfig,
)
from moe.errors import InputError
from moe.qk_clip import MAX_LOGITS, clip_heads, require_clippable
from moe.transformer import Transformer

KINDS = {
    'each its own key': AttentionConfig(4, 4, 4, qkv_bias=True),
    'shared keys': AttentionConfig(4, 2, 4, qkv_bias=True),
    'latent': LatentAttentionConfig(4, 6, 4, 4, 5),
    'latent queries': LatentAttentionConfig(4, 6, 4, 4, 5, query_rank=7),
}
TOKENS = jax.random.randint(jax.random.key(7), (3, 9), 0, 24)
SEGMENTS = jnp.array([[1] * 9, [1] * 4 + [2] * 5, [1] * 5 + [0] * 4])


def config_of(*kinds) -> TransformerConfig:
    return TransformerConfig(24, len(kinds), 8, 8, kinds)


def random_variables(config: TransformerConfig):
    init = jax.jit(lambda key: nn.unbox(Transformer(config).init(key, TOKENS)))
    variables = init(jax.random.key(0))
    assert MAX_LOGITS not in variables
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return structure.unflatten([x + 0.5 * n for x, n in zip(leaves, noise, strict=True)])


@functools.partial(jax.jit, static_argnums=0)
def measured(config: TransformerConfig, variables, tokens=TOKENS):
    model = Transformer(config)
    apply = functools.partial(model.apply, variables, tokens, segment_ids=SEGMENTS, logits=False)
    return apply(mutable=[MAX_LOGITS])[1][MAX_LOGITS]


def test_the_largest_logit_of_each_head_equals_a_loop():
    # Without positions a logit is a product of projections of the normed embedding.
    attention = AttentionConfig(4, 2, 4, rope_theta=None, scale=0.7)
    config = config_of(attention)
    variables = random_variables(config)
    highest = measured(config, variables)['group_0']['layer_0']['attention']['highest']
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables['params'])
    layer = params['group_0']['layer_0']
    x = params['embed']['embedding'][TOKENS]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * layer['attention_norm']['scale'][0]
    q = np.einsum('btd,dhk->bthk', x, layer['attention']['q'][0])
    k = np.einsum('btd,dhk->bthk', x, layer['attention']['k'][0])
    expected = np.full(4, -np.inf)
    for b, t, s in np.ndindex(3, 9, 9):
        if s <= t and SEGMENTS[b, s] == SEGMENTS[b, t] > 0:
            for h in range(4):
                expected[h] = max(expected[h], 0.7 * q[b, t, h] @ k[b, s, h // 2])
    np.testing.assert_allclose(highest, expected[None], rtol=1e-4)
    # What padding would have reached does not count.
    other = jnp.where(SEGMENTS > 0, TOKENS, 5)
    again = measured(config, variables, other)['group_0']['layer_0']['attention']['highest']
    np.testing.assert_array_equal(again, highest)


def test_nothing_is_measured_unless_it_is_asked_for():
    config = config_of(KINDS['shared keys'])
    output = jax.jit(Transformer(config).apply)(random_variables(config), TOKENS)
    assert output.logits is not None


def test_factors_by_hand():
    # Two heads of two channels; logits of 8 and 3 and a threshold of 2: 1/4, and 2/3.
    heads = {'q': jnp.ones((1, 1, 2, 2)), 'k': jnp.full((1, 1, 2, 2), 3.0), 'v': jnp.ones(1)}
    own = TransformerConfig(8, 1, 1, 8, AttentionConfig(2, 2, 2))
    highest = {'group_0': {'layer_0': {'attention': {'highest': jnp.array([[8.0, 3.0]])}}}}

    def clipped(config, weights, threshold=2.0):
        params = {'group_0': {'layer_0': {'attention': weights, 'mlp': 5.0}}, 'head': 7.0}
        new = clip_heads(config, params, highest, threshold)
        assert (new['head'], new['group_0']['layer_0']['mlp']) == (7.0, 5.0)
        return new['group_0']['layer_0']['attention']

    root = np.sqrt([1 / 4, 2 / 3])[:, None] * np.ones(2)
    both = clipped(own, heads)
    np.testing.assert_allclose(both['q'][0, 0], root, rtol=1e-6)
    np.testing.assert_allclose(both['k'][0, 0], 3 * root, rtol=1e-6)
    shared = TransformerConfig(8, 1, 1, 8, AttentionConfig(2, 1, 2))
    queries = clipped(shared, {**heads, 'k': heads['k'][:, :, :1]}, threshold=4.0)
    np.testing.assert_allclose(queries['q'][0, 0], [[0.5, 0.5], [1, 1]], rtol=1e-6)
    np.testing.assert_array_equal(queries['k'], heads['k'][:, :, :1])

    latent = TransformerConfig(8, 1, 1, 8, LatentAttentionConfig(2, 1, 1, 2, 1))
    new = clipped(latent, {'q': jnp.ones((1, 1, 2, 3)), 'kv_up': jnp.full((1, 1, 2, 2), 3.0)})
    np.testing.assert_allclose(
        new['q'][0, 0], [[0.5, 0.25, 0.25], [(2 / 3) ** 0.5, 2 / 3, 2 / 3]], rtol=1e-6
    )
    np.testing.assert_allclose(new['kv_up'][0, 0], [[1.5, 3], [3 * (2 / 3) ** 0.5, 3]], rtol=1e-6)


@pytest.mark.parametrize(
    ('kind', 'scan_layers'), [*((kind, True) for kind in KINDS), ('latent queries', False)]
)
def test_the_same_text_then_reaches_the_threshold_and_other_heads_keep_their_bits(
    kind, scan_layers
):
    config = dataclasses.replace(config_of(KINDS[kind]), scan_layers=scan_layers)
    variables = random_variables(config)
    before = np.ravel(jax.tree.leaves(measured(config, variables))[0])
    threshold = float(np.sort(before)[1:3].mean())
    assert threshold > 0
    params = clip_heads(config, variables['params'], measured(config, variables), threshold)
    after = np.ravel(jax.tree.leaves(measured(config, {**variables, 'params': params}))[0])
    np.testing.assert_allclose(after, np.minimum(before, threshold), rtol=1e-4)
    kept = before <= threshold
    assert kept.sum() == 2
    names = set()
    for path, new in jax.tree_util.tree_leaves_with_path(params):
        old = variables['params']
        for key in path:
            old = old[key.key]
        if np.array_equal(new, old):
            continue
        names.add(path[-1].key)
        new, old = (np.asarray(x)[0] if scan_layers else np.asarray(x) for x in (new, old))
        new, old = (np.moveaxis(x, -2, 0) for x in (new, old))
        np.testing.assert_array_equal(new[kept], old[kept])
        assert np.all(np.any(new[~kept] != old[~kept], axis=tuple(range(1, new.ndim))))
    expected = {
        'each its own key': {'q', 'k', 'q_bias', 'k_bias'},
        'shared keys': {'q', 'q_bias'},
        'latent': {'q', 'kv_up'},
        'latent queries': {'q_up', 'kv_up'},
    }
    assert names == expected[kind]


def test_each_layer_is_clipped_by_its_own_heads():
    kinds = (KINDS['shared keys'], KINDS['latent'], KINDS['shared keys'], KINDS['latent'])
    config = config_of(*kinds)
    variables = random_variables(config)
    noted = measured(config, variables)['group_0']
    assert {name: layer['attention']['highest'].shape for name, layer in noted.items()} == {
        'layer_0': (2, 4),
        'layer_1': (2, 4),
    }
    alone = jnp.zeros((2, 4)).at[1, 2].set(8.0)
    none = jnp.zeros((2, 4))
    highest = {
        'group_0': {
            'layer_0': {'attention': {'highest': none}},
            'layer_1': {'attention': {'highest': alone}},
        }
    }
    params = clip_heads(config, variables['params'], highest, 2.0)
    ratio = params['group_0']['layer_1']['attention']['q']
    ratio = ratio / variables['params']['group_0']['layer_1']['attention']['q']
    expected = np.ones((2, 8, 4, 8))
    expected[1, :, 2] = [0.5] * 4 + [0.25] * 4
    np.testing.assert_allclose(ratio, expected, rtol=1e-6)
    jax.tree.map(
        np.testing.assert_array_equal,
        params['group_0']['layer_0'],
        variables['params']['group_0']['layer_0'],
    )


@pytest.mark.parametrize(
    ('attention', 'message'),
    [
        (AttentionConfig(4, 2, 4, 'head'), "qk_norm='head'"),
        (AttentionConfig(4, 2, 4, clip_qkv=8.0), 'clip_qkv=8.0'),
        (AttentionConfig(4, 2, 4, soft_cap=50.0), 'soft_cap=50.0'),
        (LinearAttentionConfig(2, 4, 4, 2), 'needs attention by softmax'),
    ],
)
def test_logits_that_weights_do_not_scale_are_refused(attention, message):
    with pytest.raises(InputError, match=message):
        require_clippable(config_of(attention))
    require_clippable(config_of(KINDS['latent'], LinearAttentionConfig(2, 4, 4, 2)))
