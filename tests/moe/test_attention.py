"""Attention against loops in float64 NumPy; its gradients against those of the plain formula."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.attention import Attention
from moe.attention_context import (
    attention_contexts,
    attention_mask,
    ring_slots,
    segment_positions,
)
from moe.attention_kinds import empty_cache
from moe.config import AttentionConfig, TransformerConfig, YarnScaling
from moe.dot_product import dot_product_attention, laid_out
from moe.rope import rope_frequencies

YARN = YarnScaling(4.0, 8, beta_fast=2.0, beta_slow=0.2, truncate=False)
EVERYTHING = AttentionConfig(
    4,
    2,
    6,
    'head',
    rope_theta=100.0,
    rope_scaling=YARN,
    window=3,
    sinks=True,
    qkv_bias=True,
    output_bias=True,
    clip_qkv=0.9,
    scale=0.7,
    soft_cap=0.8,
)


def config_of(attention: AttentionConfig) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=16, num_layers=1, embed_dim=12, mlp_dim=8, attention=attention
    )


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def reference_norm(x: np.ndarray, kind: str, scale: np.ndarray) -> np.ndarray:
    axes = (-1,) if kind == 'head' else (-2, -1)
    return x / np.sqrt((x**2).mean(axes, keepdims=True) + 1e-6) * scale


def reference_rope(x: np.ndarray, position: int, config: AttentionConfig) -> np.ndarray:
    """The stretched frequencies themselves are checked beside `moe.rope`."""
    half = x.shape[-1] // 2
    angles = position * rope_frequencies(2 * half, config.rope_theta, config.rope_scaling)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    if config.rope_scaling is not None:
        turned *= 0.1 * np.log(config.rope_scaling.factor) + 1
    return np.concatenate([turned.real, turned.imag], axis=-1)


def reference_project(config: AttentionConfig, params, x, name: str, positions) -> np.ndarray:
    """Queries, keys or values of one row."""
    y = np.einsum('td,dhk->thk', x, params[name])
    if config.qkv_bias:
        y = y + params[f'{name}_bias']
    if config.qk_norm != 'none' and name != 'v':
        y = reference_norm(y, config.qk_norm, params[f'{name}_norm']['scale'])
    if config.clip_qkv is not None:
        y = np.minimum(np.maximum(y, -config.clip_qkv), config.clip_qkv)
    if config.rope_theta is not None and name != 'v':
        y = np.stack([reference_rope(y[t], positions[t], config) for t in range(len(y))])
    return y


def reference(config: AttentionConfig, params, x, segments, positions) -> np.ndarray:
    """One query, one head at a time."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    out = np.zeros(x.shape)
    for b in range(x.shape[0]):
        q, k, v = (reference_project(config, params, x[b], name, positions[b]) for name in 'qkv')
        for t in range(x.shape[1]):
            first = 0 if config.window is None else max(0, t - config.window + 1)
            seen = [s for s in range(first, t + 1) if segments[b, s] == segments[b, t]]
            for h in range(config.num_heads):
                shared = h // (config.num_heads // config.num_kv_heads)
                scores = k[seen, shared] @ q[t, h] * (config.scale or config.head_dim**-0.5)
                if config.soft_cap is not None:
                    scores = config.soft_cap * np.tanh(scores / config.soft_cap)
                weights = np.exp(scores)
                total = weights.sum() + (np.exp(params['sinks'][h]) if config.sinks else 0)
                out[b, t] += (weights / total) @ v[seen, shared] @ params['o'][h]
            out[b, t] += params['o_bias'] if config.output_bias else 0
    return out


@pytest.mark.parametrize(
    'attention',
    [
        AttentionConfig(4, 4, 6, rope_theta=100.0),
        AttentionConfig(4, 2, 6, 'head', rope_theta=None),
        AttentionConfig(4, 1, 6, 'full', rope_theta=100.0),
        EVERYTHING,
    ],
)
def test_attention_equals_a_loop_over_queries_and_heads(attention):
    config = config_of(attention)
    x = normal(0, 2, 7, 12)
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1]])
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 30], [0, 1, 0, 1, 2, 3, 4]])
    (context,), _ = attention_contexts((attention,), positions, segments, (2, 7), None)
    layer = Attention(attention, config)
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x, None, context))['params']
    params = jax.tree.map(lambda leaf: leaf + 0.3 * normal(1, *leaf.shape), params)
    y, cache = jax.jit(layer.apply)({'params': params}, x, None, context)
    expected = reference(attention, params, np.asarray(x, np.float64), segments, positions)
    assert cache is None
    np.testing.assert_allclose(y, expected, atol=2e-5)


def plain(q, k, v, allowed, sinks=None, cap=None):
    """The formula as it stands, with keys repeated for their heads."""
    repeat = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, repeat, axis=2), jnp.repeat(v, repeat, axis=2)
    scores = jnp.einsum('bthd,bshd->bhts', q, k) / np.sqrt(q.shape[-1])
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    weights = jnp.exp(jnp.where(allowed[:, None], scores, -jnp.inf))
    total = weights.sum(-1, keepdims=True)
    total += 0 if sinks is None else jnp.exp(sinks)[:, None, None]
    return jnp.einsum('bhts,bshd->bthd', weights / total, v)


@pytest.mark.parametrize(
    ('length', 'window', 'cap'),
    [(9, None, None), (64, None, None), (70, 5, 0.5), (200, 70, None), (200, None, 2.0)],
)
def test_blocks_and_their_backward_pass_equal_the_plain_formula(length, window, cap):
    q, k, v, cotangent = (normal(i, 2, length, heads, 4) for i, heads in enumerate([4, 2, 2, 4]))
    v, cotangent = (jnp.concatenate([x, x[..., :1]], axis=-1) for x in (v, cotangent))
    # Where no score is capped there are no sinks, so that both are seen without the other.
    operands = (q, k, v) if cap is None else (q, k, v, normal(5, 4))
    segments = jnp.stack([jnp.arange(length) // 50 + 1, jnp.ones(length, int)])
    allowed = attention_mask(jnp.arange(length), jnp.arange(length), segments, segments, window)

    def blocks(q, k, v, sinks=None):
        settings = {'causal': True, 'window': window, 'score_cap': cap, 'sinks': sinks}
        return dot_product_attention(q, *laid_out(k, v), allowed, **settings)

    @jax.jit
    def both(*operands):
        ours = jax.vjp(blocks, *operands)
        theirs = jax.vjp(
            lambda q, k, v, *sinks: plain(q, k, v, allowed, *sinks, cap=cap), *operands
        )
        return [(value, pullback(cotangent)) for value, pullback in (ours, theirs)]

    ours, theirs = both(*operands)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, theirs)


def test_no_array_of_queries_by_keys_is_kept_for_the_backward_pass():
    q = jax.ShapeDtypeStruct((1, 512, 2, 4), jnp.float32)
    k = jax.ShapeDtypeStruct((1, 2, 4, 512), jnp.float32)
    v = jax.ShapeDtypeStruct((1, 2, 512, 4), jnp.float32)
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


def test_a_window_counts_the_query_itself():
    allowed = attention_mask(jnp.arange(4), jnp.arange(4), window=2)
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(allowed[0], np.array(expected, bool))


@pytest.mark.parametrize(
    ('start', 'expected'), [(0, [-4, -3, -2, -1]), (3, [0, 1, 2, -1]), (9, [8, 5, 6, 7])]
)
def test_a_ring_holds_the_last_tokens(start, expected):
    np.testing.assert_array_equal(ring_slots(jnp.int32(start), 4), expected)


def test_an_empty_cache_has_the_shape_and_dtype_of_the_model():
    config = dataclasses.replace(config_of(AttentionConfig(4, 2, 6)), dtype='bfloat16')
    cache = empty_cache(config, 3, 10)
    (layers,) = cache.layers
    assert layers.keys.shape == (1, 3, 2, 6, 10)
    assert layers.values.shape == (1, 3, 2, 10, 6)
    assert layers.keys.dtype == jnp.bfloat16
    np.testing.assert_array_equal(cache.length, [0, 0, 0])
    assert not cache.segment_ids.any()
