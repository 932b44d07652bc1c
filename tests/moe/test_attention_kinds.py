"""Every kind of attention in a whole model: decoding, caches, gradients and meshes."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.attention_kinds import empty_cache
from moe.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    MoEConfig,
    RouterConfig,
    TransformerConfig,
    YarnScaling,
)
from moe.errors import InputError
from moe.latent_attention import absorbing_is_cheaper
from moe.sharding import MeshConfig, init_sharded, make_mesh
from moe.stacking import layer_groups, layer_kinds
from moe.transformer import Transformer, embed_tokens, output_head, output_logits

GLOBAL = AttentionConfig(2, 1, 8, rope_theta=500.0)
SLIDING = AttentionConfig(2, 2, 8, window=3, sinks=True, qkv_bias=True, output_bias=True)
LATENT = LatentAttentionConfig(2, 6, 8, 4, 4, 10)
LINEAR = LinearAttentionConfig(2, 4, 6, 3)
YARN = YarnScaling(4.0, 4, beta_fast=2.0, beta_slow=0.2, mscale=1.0, mscale_all_dim=0.5)
CLIPPED = AttentionConfig(
    4, 2, 4, 'full', rope_scaling=YARN, clip_qkv=0.9, scale=0.7, soft_cap=0.8, sinks=True
)
HEADWISE = AttentionConfig(2, 1, 8, 'head', rope_theta=None, window=4, soft_cap=2.0)
STRETCHED = LatentAttentionConfig(2, 6, 8, 4, 4, rope_scaling=YARN)
MIXED = TransformerConfig(
    vocab_size=20,
    num_layers=5,
    embed_dim=16,
    mlp_dim=12,
    attention=(SLIDING, LATENT, LINEAR, GLOBAL),
    moe=MoEConfig(RouterConfig(4, 2), 6, dispatch='dense', layers=(1, 4)),
    norm_unit_offset=True,
    norm_scale_float32=True,
    post_norms=True,
    scale_embedding=True,
    logit_soft_cap=5.0,
)
SMALL = dataclasses.replace(MIXED, num_layers=2, attention=GLOBAL, moe=None)
TOKENS = jax.random.randint(jax.random.key(7), (2, 9), 0, 20)
SEGMENTS = jnp.array([[1] * 9, [0, 0, 1, 1, 1, 1, 1, 1, 1]])
POSITIONS = jnp.maximum(jnp.arange(9) - jnp.array([[0], [2]]), 0)


@functools.cache
def variables_of(config: TransformerConfig):
    drawn = jax.jit(lambda key: nn.unbox(Transformer(config).init(key, TOKENS)))(jax.random.key(0))
    # No parameter is left at zero: sinks, biases and offset scales begin there.
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(drawn))))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), drawn)


@functools.partial(jax.jit, static_argnames='config')
def full(config, variables):
    return Transformer(config).apply(variables, TOKENS, POSITIONS, SEGMENTS).logits


@functools.partial(jax.jit, static_argnames='config')
def token_by_token(config, variables):
    """The logits of a prompt of four tokens at once and then of one after the other."""
    model = Transformer(config)
    first = model.apply(
        variables,
        TOKENS[:, :4],
        POSITIONS[:, :4],
        SEGMENTS[:, :4],
        cache=empty_cache(config, 2, 10),
    )

    def step(cache, token):
        new = [part[:, None] for part in token]
        out = model.apply(variables, *new, cache=cache)
        return out.cache, out.logits[:, 0]

    rest = [part[:, 4:].T for part in (TOKENS, POSITIONS, SEGMENTS)]
    cache, logits = jax.lax.scan(step, first.cache, rest)
    return jnp.concatenate([first.logits, logits.swapaxes(0, 1)], axis=1), cache.length


@pytest.mark.parametrize(
    'config',
    [
        dataclasses.replace(SMALL, attention=(SLIDING, LATENT), num_layers=4),
        dataclasses.replace(SMALL, attention=(CLIPPED, HEADWISE, STRETCHED), num_layers=3),
        MIXED,
    ],
)
def test_decoding_with_a_cache_equals_the_full_forward_token_by_token(config):
    variables = variables_of(config)
    logits, length = token_by_token(config, variables)
    expected = full(config, variables)
    real = np.asarray(SEGMENTS > 0)
    np.testing.assert_allclose(logits[real], expected[real], atol=2e-5)
    np.testing.assert_array_equal(length, [9, 9])


def test_a_token_of_latent_attention_is_decoded_absorbed_and_a_text_read_expanded():
    """So that decoding, above, is compared with the other form."""
    assert absorbing_is_cheaper(LATENT, 1, 10)
    assert not absorbing_is_cheaper(LATENT, 9, 9)


def test_caches_hold_what_is_used():
    cache = empty_cache(MIXED, 3, 40, 'bfloat16')
    sliding, latent, linear, full_attention, _ = cache.layers
    assert sliding.keys.shape == (1, 3, 2, 8, 3)
    assert latent.latents.shape == (1, 3, 40, 10)
    assert linear.state.shape == (1, 3, 2, 4, 6)
    assert linear.state.dtype == jnp.float32
    assert full_attention.values.shape == (1, 3, 1, 40, 8)
    assert full_attention.values.dtype == jnp.bfloat16
    assert empty_cache(MIXED, 1, 2).layers[0].keys.shape[4] == 2
    repeated = dataclasses.replace(SMALL, attention=(SLIDING, GLOBAL), num_layers=6)
    assert empty_cache(repeated, 2, 9).layers[0].keys.shape == (3, 2, 2, 8, 3)


def test_layers_take_the_kinds_in_turn_and_are_scanned_by_their_period():
    layers = dataclasses.replace(SMALL, attention=(LINEAR, LINEAR, LATENT), num_layers=7)
    expected = (LINEAR, LINEAR, LATENT, LINEAR, LINEAR, LATENT, LINEAR)
    assert layers.attention_layers == expected
    groups = [(len(g.pattern), g.repeats) for g in layer_groups(layer_kinds(layers))]
    assert groups == [(3, 2), (1, 1)]


def test_gradients_reach_every_parameter():
    def loss(params):
        out = Transformer(MIXED).apply({'params': params}, TOKENS, POSITIONS, SEGMENTS)
        return jnp.square(out.logits).sum()

    gradients = jax.jit(jax.grad(loss))(variables_of(MIXED)['params'])
    unreached = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
        if not np.abs(leaf).max() > 1e-6
    ]
    assert unreached == []


def test_a_tensor_mesh_changes_neither_values_nor_gradients():
    config = dataclasses.replace(SMALL, attention=(SLIDING, LATENT))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    variables = init_sharded(Transformer(config), jax.random.key(0), mesh)
    tokens, segments = jnp.tile(TOKENS, (2, 1)), jnp.tile(SEGMENTS, (2, 1))

    def loss(model, params):
        out = model.apply({'params': params}, tokens, segment_ids=segments)
        return jnp.square(out.logits - 1).mean()

    sharded, alone = (
        jax.jit(jax.value_and_grad(functools.partial(loss, Transformer(config, m))))
        for m in (mesh, None)
    )
    actual = jax.device_get(sharded(variables['params']))
    params = jax.device_put(variables['params'], jax.devices()[0])
    expected = jax.device_get(alone(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, expected)


def test_capped_logits_are_no_product_with_a_head():
    variables = variables_of(SMALL)
    out = jax.jit(Transformer(SMALL).apply)(variables, TOKENS)
    head = np.asarray(variables['params']['head']['kernel'], np.float64)
    expected = 5 * np.tanh(np.asarray(out.hidden, np.float64) @ head / 5)
    np.testing.assert_allclose(out.logits, expected, atol=1e-5)
    logits = output_logits(SMALL, variables, out.hidden)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    with pytest.raises(InputError, match='logit_soft_cap is None; received 5'):
        output_head(SMALL, variables['params'])


def test_embeddings_are_scaled_in_the_dtype_of_the_model():
    config = dataclasses.replace(SMALL, embed_dim=10, dtype='bfloat16')
    table = jax.random.normal(jax.random.key(2), (20, 10))
    embedded = embed_tokens(config, table, TOKENS)
    rows = table.astype(jnp.bfloat16)[TOKENS]
    # The root of 10 is 3.1623; bfloat16 has 3.15625.
    expected = (rows.astype(jnp.float32) * 3.15625).astype(jnp.bfloat16)
    np.testing.assert_array_equal(embedded, expected)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'attention': ()}, 'one kind to num_layers=5 kinds'),
        ({'attention': (GLOBAL,) * 6}, 'one kind to num_layers=5 kinds'),
        ({'attention': 'sliding'}, "made of AttentionConfig, .*received 'sliding'"),
        ({'logit_soft_cap': 0.0}, 'logit_soft_cap must be positive, or None'),
    ],
)
def test_impossible_models_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(MIXED, **change)


@pytest.mark.parametrize(
    ('kind', 'change', 'message'),
    [
        (GLOBAL, {'window': 0}, 'attention.window must be a positive integer'),
        (GLOBAL, {'clip_qkv': -1.0}, 'attention.clip_qkv must be positive, or None'),
        (GLOBAL, {'soft_cap': 0.0}, 'attention.soft_cap must be positive, or None'),
        (LATENT, {'rope_dim': 3}, r'attention.rope_dim must be even'),
        (LATENT, {'query_rank': 0}, 'attention.query_rank must be a positive integer'),
        (LATENT, {'kv_rank': True}, 'attention.kv_rank must be a positive integer'),
    ],
)
def test_impossible_kinds_are_refused(kind, change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(kind, **change)
