"""Attention against loops in float64 NumPy; its gradients against those of the plain formula."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.attention import Attention
from moe.attention_context import attention_contexts, attention_mask, segment_positions
from moe.attention_kinds import empty_cache
from moe.config import AttentionConfig, TransformerConfig
from moe.dot_product import dot_product_attention


def config_of(qk_norm: str, kv_heads: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=16,
        num_layers=1,
        embed_dim=12,
        mlp_dim=8,
        attention=AttentionConfig(4, kv_heads, 6, qk_norm, rope_theta=100.0),
    )


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def reference_norm(x: np.ndarray, kind: str, scale: np.ndarray) -> np.ndarray:
    if kind == 'none':
        return x
    axes = (-1,) if kind == 'head' else (-2, -1)
    return x / np.sqrt((x**2).mean(axes, keepdims=True) + 1e-6) * scale


def reference_rope(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    half = x.shape[-1] // 2
    angles = position * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def reference(config: TransformerConfig, params, x, segments, positions) -> np.ndarray:
    """One query, one head at a time."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    settings = config.attention
    out = np.zeros(x.shape)
    for b in range(x.shape[0]):
        q, k, v = (np.einsum('td,dhk->thk', x[b], params[name]) for name in 'qkv')
        if settings.qk_norm != 'none':
            q = reference_norm(q, settings.qk_norm, params['q_norm']['scale'])
            k = reference_norm(k, settings.qk_norm, params['k_norm']['scale'])
        for rows in (q, k):
            for t in range(len(rows)):
                rows[t] = reference_rope(rows[t], positions[b, t], settings.rope_theta)
        for t in range(x.shape[1]):
            seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
            for h in range(settings.num_heads):
                shared = h // (settings.num_heads // settings.num_kv_heads)
                scores = k[seen, shared] @ q[t, h] / np.sqrt(settings.head_dim)
                weights = np.exp(scores - scores.max())
                out[b, t] += (weights / weights.sum()) @ v[seen, shared] @ params['o'][h]
    return out


@pytest.mark.parametrize(('qk_norm', 'kv_heads'), [('none', 4), ('head', 2), ('full', 1)])
def test_attention_equals_a_loop_over_queries_and_heads(qk_norm, kv_heads):
    config = config_of(qk_norm, kv_heads)
    x = normal(0, 2, 7, 12)
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1, 1]])
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3, 4]])
    (context,), _ = attention_contexts((config.attention,), positions, segments, (2, 7), None)
    layer = Attention(config.attention, config)
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x, None, context))['params']
    params = jax.tree.map(lambda leaf: leaf + 0.3 * normal(1, *leaf.shape), params)
    y, cache = jax.jit(layer.apply)({'params': params}, x, None, context)
    expected = reference(config, params, np.asarray(x, np.float64), segments, positions)
    assert cache is None
    np.testing.assert_allclose(y, expected, atol=2e-5)


def plain(q, k, v, allowed):
    """The formula as it stands, with keys repeated for their heads."""
    repeat = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, repeat, axis=2), jnp.repeat(v, repeat, axis=2)
    scores = jnp.einsum('bthd,bshd->bhts', q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum('bhts,bshd->bthd', weights, v)


@pytest.mark.parametrize('length', [9, 64, 70, 200])
def test_blocks_and_their_backward_pass_equal_the_plain_formula(length):
    q, k, v, cotangent = (normal(i, 2, length, heads, 4) for i, heads in enumerate([4, 2, 2, 4]))
    segments = jnp.stack([jnp.arange(length) // 50 + 1, jnp.ones(length, int)])
    allowed = attention_mask(jnp.arange(length), jnp.arange(length), segments, segments)

    @jax.jit
    def both(q, k, v):
        ours = jax.vjp(lambda *qkv: dot_product_attention(*qkv, allowed, causal=True), q, k, v)
        theirs = jax.vjp(lambda *qkv: plain(*qkv, allowed), q, k, v)
        return [(value, pullback(cotangent)) for value, pullback in (ours, theirs)]

    ours, theirs = both(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, theirs)


def test_no_array_of_queries_by_keys_is_kept_for_the_backward_pass():
    q, k, v = (jax.ShapeDtypeStruct((1, 512, 2, 4), jnp.float32),) * 3
    allowed = jax.ShapeDtypeStruct((1, 512, 512), bool)

    def residuals(q, k, v, allowed):
        attend = functools.partial(dot_product_attention, allowed=allowed, causal=True)
        return jax.tree.leaves(jax.vjp(attend, q, k, v)[1])

    kept = jax.eval_shape(residuals, q, k, v, allowed)
    assert kept
    assert max(leaf.size for leaf in kept if leaf.dtype != bool) <= 512 * 2 * 4


def test_positions_count_from_the_start_of_each_segment():
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [0, 0, 3, 3, 4, 4]])
    expected = [[0, 1, 0, 1, 2, 0], [0, 1, 0, 1, 0, 1]]
    np.testing.assert_array_equal(segment_positions(segments), expected)


def test_mask_is_causal_within_segments_and_never_empty():
    segments = jnp.array([[0, 1, 1, 2]])
    allowed = attention_mask(jnp.arange(4), jnp.arange(4), segments, segments)
    expected = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(allowed[0], np.array(expected, bool))


def test_an_empty_cache_has_the_shape_and_dtype_of_the_model():
    config = dataclasses.replace(config_of('none', 2), dtype='bfloat16')
    cache = empty_cache(config, 3, 10)
    (layers,) = cache.layers
    assert layers.keys.shape == layers.values.shape == (1, 3, 10, 2, 6)
    assert layers.keys.dtype == jnp.bfloat16
    assert int(cache.length) == 0
    assert not cache.segment_ids.any()
