"""Width and depth: planted dead parts are found, cut exactly, and leave the logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    MoEConfig,
    TransformerConfig,
)
from moe.errors import InputError
from moe.importance import importance
from moe.observe import Calibration
from moe.pruning import Kept, choose_layers, choose_width, prune_depth, prune_width
from moe.routing import RouterConfig
from moe.sharding import abstract_variables
from moe.transformer import Transformer

ATTENTION = AttentionConfig(4, 2, 4, qk_norm='head', output_bias=True, qkv_bias=True)
WIDE = TransformerConfig(19, 3, 12, 10, ATTENTION, norm_eps=1e-9)
NARROW = dataclasses.replace(
    WIDE,
    embed_dim=8,
    mlp_dim=6,
    attention=dataclasses.replace(ATTENTION, num_heads=2, num_kv_heads=2),
)
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 19)
ALIVE = {'embed': [0, 2, 3, 4, 7, 8, 10, 11], 'mlp': [1, 2, 4, 5, 8, 9], 'heads': [1, 2]}


def make(config: TransformerConfig):
    """Initialises a model, and gives every norm and bias something to lose."""
    params = jax.jit(lambda key: nn.unbox(Transformer(config).init(key, TOKENS)))(
        jax.random.key(0)
    )['params']
    key = jax.random.key(7)
    return jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(key, x.shape) if x.ndim <= 2 else x, params
    )


def alive(size: int, indices) -> jnp.ndarray:
    return jnp.zeros(size).at[jnp.array(indices)].set(1.0)


def plant(config: TransformerConfig, params):
    """Kills all channels, units and heads but `ALIVE`."""
    embed, mlp, heads = alive(12, ALIVE['embed']), alive(10, ALIVE['mlp']), alive(4, ALIVE['heads'])

    def kill(path, x):
        names = [key.key for key in path]
        if names[-1] == 'o':
            x = x * heads[:, None, None]
        if names[-2:] == ['mlp', 'gate_up']:
            x = x * mlp
        writes = names[-1] in ('o', 'o_bias', 'down', 'embedding')
        return x * embed if writes else x

    return jax.tree_util.tree_map_with_path(kill, params)


PARAMS = make(WIDE)
PLANTED = plant(WIDE, PARAMS)


def logits(config: TransformerConfig, params) -> np.ndarray:
    return np.asarray(jax.jit(Transformer(config).apply)({'params': params}, TOKENS).logits)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


def measured(config: TransformerConfig, params):
    return importance(Transformer(config), {'params': params}, Calibration(TOKENS))


def test_planted_dead_parts_are_found_and_their_loss_changes_nothing():
    kept = choose_width(measured(WIDE, PLANTED), WIDE, NARROW)
    assert kept.embed.tolist() == ALIVE['embed']
    assert [units.tolist() for units in kept.mlp] == [ALIVE['mlp']] * 3
    assert [heads.tolist() for heads in kept.heads] == [ALIVE['heads']] * 3
    assert [heads.tolist() for heads in kept.kv_heads] == [[0, 1]] * 3
    assert kept.embed_energy == pytest.approx(1.0)
    config, params = prune_width(WIDE, PLANTED, kept)
    assert config == NARROW
    assert shapes({'params': params}) == shapes(abstract_variables(Transformer(config)))
    expected = logits(WIDE, PLANTED)
    np.testing.assert_allclose(logits(config, params), expected, atol=2e-5)


def test_scaled_tied_embeddings_and_offset_norms_survive_the_loss_of_dead_channels():
    changes = {
        'num_layers': 1,
        'scale_embedding': True,
        'tie_embeddings': True,
        'norm_unit_offset': True,
        'post_norms': True,
    }
    wide, narrow = (dataclasses.replace(config, **changes) for config in (WIDE, NARROW))
    params = plant(wide, make(wide))

    def kill_post_norms(path, x):
        is_post = path[-2].key.endswith('post_norm')
        return jnp.where(alive(12, ALIVE['embed']) > 0, x, -1.0) if is_post else x

    params = jax.tree_util.tree_map_with_path(kill_post_norms, params)
    config, pruned = prune_width(wide, params, choose_width(measured(wide, params), wide, narrow))
    assert config == narrow
    np.testing.assert_allclose(logits(config, pruned), logits(wide, params), atol=2e-5)


def test_exactly_the_kept_rows_and_columns_remain():
    kept = Kept(
        embed=np.array([1, 4, 5]),
        mlp=(np.array([0, 3]), np.array([2, 9]), np.array([4, 5])),
        kv_heads=(np.array([1]),) * 3,
        heads=(np.array([2, 3]), np.array([3, 2]), np.array([2, 3])),
        embed_energy=0.25,
    )
    config, params = prune_width(WIDE, PARAMS, kept)
    assert (config.embed_dim, config.mlp_dim) == (3, 2)
    assert (config.attention.num_heads, config.attention.num_kv_heads) == (2, 1)
    wide, narrow = (jax.tree.map(np.asarray, p['group_0']['layer_0']) for p in (PARAMS, params))
    for i in range(3):
        embed, units, heads = kept.embed, kept.mlp[i], kept.heads[i]
        for name, index in {
            'q': np.ix_(embed, heads, range(4)),
            'k': np.ix_(embed, [1], range(4)),
            'v': np.ix_(embed, [1], range(4)),
            'o': np.ix_(heads, range(4), embed),
            'q_bias': np.ix_(heads, range(4)),
            'k_bias': np.ix_([1], range(4)),
            'o_bias': embed,
        }.items():
            cut = wide['attention'][name][i][index]
            np.testing.assert_array_equal(narrow['attention'][name][i], cut)
        cut = wide['mlp']['gate_up'][i][np.ix_(embed, range(2), units)]
        np.testing.assert_array_equal(narrow['mlp']['gate_up'][i], cut)
        cut = wide['mlp']['down'][i][np.ix_(units, embed)]
        np.testing.assert_array_equal(narrow['mlp']['down'][i], cut)
        # A quarter of the energy in a quarter of the channels: the norms stay as they are.
        scale = wide['mlp_norm']['scale'][i][embed]
        np.testing.assert_allclose(narrow['mlp_norm']['scale'][i], scale, rtol=1e-6)
    norms = (each['attention']['q_norm']['scale'] for each in (narrow, wide))
    np.testing.assert_array_equal(*norms)
    np.testing.assert_array_equal(params['head']['kernel'], PARAMS['head']['kernel'][kept.embed])
    table = PARAMS['embed']['embedding'][:, kept.embed]
    np.testing.assert_array_equal(params['embed']['embedding'], table)


OTHER_KINDS = {
    'latent': LatentAttentionConfig(4, 6, 4, 2, 4, query_rank=5),
    'linear': LinearAttentionConfig(4, 4, 3, 3, conv_width=2),
    'sinks': AttentionConfig(4, 4, 4, sinks=True, window=3, qk_norm='none'),
}


@pytest.mark.parametrize('kind', OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_every_kind_of_attention_loses_its_dead_heads_and_channels(kind):
    heads = {'num_heads': 2}
    if isinstance(kind, AttentionConfig):
        heads['num_kv_heads'] = 2
    wide = dataclasses.replace(WIDE, num_layers=2, attention=kind)
    attention = dataclasses.replace(kind, **heads)
    narrow = dataclasses.replace(wide, embed_dim=8, mlp_dim=6, attention=attention)
    params = plant(wide, make(wide))
    kept = choose_width(measured(wide, params), wide, narrow)
    assert [heads.tolist() for heads in kept.heads] == [ALIVE['heads']] * 2
    config, pruned = prune_width(wide, params, kept)
    assert config == narrow
    assert shapes({'params': pruned}) == shapes(abstract_variables(Transformer(config)))
    np.testing.assert_allclose(logits(config, pruned), logits(wide, params), atol=2e-5)


def test_a_permuted_model_keeps_the_permuted_parts():
    order = {'embed': np.random.default_rng(0).permutation(12), 'mlp': np.arange(10)[::-1]}
    heads = np.array([3, 2, 1, 0])  # Reverses the groups, and the heads of each.
    kept = Kept(order['embed'], (order['mlp'],) * 3, (np.array([1, 0]),) * 3, (heads,) * 3, 1.0)
    config, permuted = prune_width(WIDE, PLANTED, kept)
    assert config == WIDE
    np.testing.assert_allclose(logits(WIDE, permuted), logits(WIDE, PLANTED), atol=2e-5)
    found = choose_width(measured(WIDE, permuted), WIDE, NARROW)
    assert sorted(order['embed'][found.embed]) == ALIVE['embed']
    assert sorted(order['mlp'][found.mlp[2]]) == ALIVE['mlp']
    assert sorted(heads[found.heads[1]]) == ALIVE['heads']


def test_query_heads_are_taken_evenly_from_the_best_groups():
    scores = measured(WIDE, PARAMS)
    by_hand = dataclasses.replace(scores, heads=(jnp.array([9.0, 1.0, 4.0, 5.0]),) * 3)
    asked = {'num_heads': 2, 'num_kv_heads': 2}
    target = dataclasses.replace(WIDE, attention=dataclasses.replace(ATTENTION, **asked))
    assert choose_width(by_hand, WIDE, target).heads[0].tolist() == [0, 3]
    asked = {'num_heads': 2, 'num_kv_heads': 1}
    target = dataclasses.replace(WIDE, attention=dataclasses.replace(ATTENTION, **asked))
    kept = choose_width(by_hand, WIDE, target)
    assert (kept.kv_heads[0].tolist(), kept.heads[0].tolist()) == ([0], [0, 1])
    asked = {'num_heads': 3, 'num_kv_heads': 1}
    target = dataclasses.replace(WIDE, attention=dataclasses.replace(ATTENTION, **asked))
    with pytest.raises(InputError, match=r'num_heads / num_kv_heads is 2; received 3'):
        choose_width(by_hand, WIDE, target)
    windowed = dataclasses.replace(WIDE, attention=dataclasses.replace(ATTENTION, window=4))
    with pytest.raises(InputError, match='number of heads and nothing else'):
        choose_width(by_hand, WIDE, windowed)
    with pytest.raises(InputError, match=r'embed_dim is 12; received 14'):
        choose_width(by_hand, WIDE, dataclasses.replace(WIDE, embed_dim=14))


def test_importance_against_numpy():
    segments = jnp.ones(TOKENS.shape, jnp.int32).at[0, 5:].set(0)
    scores = importance(Transformer(WIDE), {'params': PARAMS}, Calibration(TOKENS, segments))
    mask = np.asarray(segments) > 0
    # The first block's input is the embedding; its norm's output is known without the model.
    first = jax.tree.map(lambda x: np.asarray(x[0], np.float64), PARAMS['group_0']['layer_0'])
    x = np.asarray(PARAMS['embed']['embedding'], np.float64)[np.asarray(TOKENS)][mask]
    unit = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-9)
    assert np.asarray(scores.embed_energy).sum() == pytest.approx(1.0, rel=1e-5)
    # A model of one layer without attention: hidden units and influence by hand.
    config = dataclasses.replace(WIDE, num_layers=1)
    layer = {**PARAMS['group_0']['layer_0']}
    silent = {
        name: 0 * v if name in ('o', 'o_bias') else v for name, v in layer['attention'].items()
    }
    layer = jax.tree.map(lambda v: v[:1], {**layer, 'attention': silent})
    params = {**PARAMS, 'group_0': {'layer_0': layer}}
    scores = importance(Transformer(config), {'params': params}, Calibration(TOKENS, segments))
    normed = unit * first['mlp_norm']['scale']
    gate, up = (normed @ first['mlp']['gate_up'][:, i] for i in (0, 1))
    hidden = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(scores.mlp[0], np.abs(hidden).mean(0), rtol=1e-4)
    y = x + hidden @ first['mlp']['down']
    lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    expected = 1 - ((x * y).sum(-1) / lengths).mean()
    np.testing.assert_allclose(scores.layers, [expected], rtol=1e-3)
    np.testing.assert_array_equal(scores.heads[0], np.zeros(4))
    final = y / np.sqrt(np.square(y).mean(-1, keepdims=True) + 1e-9)
    outputs = (
        unit * first['attention_norm']['scale'],
        normed,
        final * np.asarray(PARAMS['final_norm']['scale']),
    )
    expected = np.mean([np.abs(each).mean(0) for each in outputs], axis=0)
    np.testing.assert_allclose(scores.embed, expected, rtol=1e-4)
    expected = np.mean([np.square(each).mean(0) for each in (unit, unit, final)], axis=0) / 12
    np.testing.assert_allclose(scores.embed_energy, expected, rtol=1e-4)


def test_a_heads_importance_is_the_norm_of_what_it_adds():
    # One head of each token's own value alone: the first token sees nothing but itself.
    config = dataclasses.replace(WIDE, num_layers=1)
    params = make(config)
    first = Calibration(TOKENS[:, :1])
    scores = importance(Transformer(config), {'params': params}, first).heads[0]
    layer = jax.tree.map(lambda x: np.asarray(x[0], np.float64), params['group_0']['layer_0'])
    x = np.asarray(params['embed']['embedding'], np.float64)[np.asarray(TOKENS[:, 0])]
    normed = x / np.sqrt(np.square(x).mean(-1, keepdims=True)) * layer['attention_norm']['scale']
    values = np.einsum('bd,dhe->bhe', normed, layer['attention']['v'])
    values = np.repeat(values + layer['attention']['v_bias'], 2, axis=1)
    added = np.einsum('bhe,hed->bhd', values, layer['attention']['o'])
    np.testing.assert_allclose(scores, np.linalg.norm(added, axis=-1).mean(0), rtol=1e-4)


def test_the_idlest_layer_goes():
    silent = jax.tree_util.tree_map_with_path(
        lambda path, x: x.at[1].set(0) if path[-1].key in ('o', 'o_bias', 'down') else x, PARAMS
    )
    scores = measured(WIDE, silent)
    assert float(scores.layers[1]) == pytest.approx(0, abs=1e-6)
    keep = choose_layers(scores, 2)
    assert keep == (0, 2)
    config, params, routing = prune_depth(WIDE, silent, {}, keep)
    assert config == dataclasses.replace(WIDE, num_layers=2)
    assert routing == {}
    assert shapes({'params': params}) == shapes(abstract_variables(Transformer(config)))
    np.testing.assert_allclose(logits(config, params), logits(WIDE, silent), atol=1e-5)
    with pytest.raises(InputError, match='distinct layers'):
        prune_depth(WIDE, silent, {}, (0, 3))
    with pytest.raises(InputError, match='only take layers away'):
        choose_layers(scores, 4)


def test_depth_keeps_each_layers_own_attention_and_experts():
    moe = MoEConfig(RouterConfig(2, 1, selection_bias=True), expert_dim=4, layers=(1, 3))
    attention = AttentionConfig(2, 1, 4)
    windowed = dataclasses.replace(attention, window=2)
    config = TransformerConfig(19, 4, 8, 6, (windowed, attention), moe)
    variables = jax.jit(lambda key: nn.unbox(Transformer(config).init(key, TOKENS)))(
        jax.random.key(0)
    )
    biases = jax.tree.map(lambda x: x + jnp.array([[1.0, 2.0], [3.0, 4.0]]), variables['routing'])
    small, params, routing = prune_depth(config, variables['params'], biases, (0, 2, 3))
    assert small.attention == (windowed, windowed, attention)
    assert small.moe.layers == (2,)
    expected = abstract_variables(Transformer(small))
    assert shapes({'params': params, 'routing': routing}) == shapes(expected)
    np.testing.assert_array_equal(jax.tree.leaves(routing)[0], [[3.0, 4.0]])
    dense = prune_depth(config, variables['params'], biases, (0, 2))[0]
    assert dense.moe is None
    assert dense.attention == windowed
